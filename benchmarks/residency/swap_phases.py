"""What `bench_swap` measures, each in a process of its own: `swap_phases.py PHASE FOLDER LINK_GB_PER_S`."""

from __future__ import annotations

import itertools
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import spread

from flashtensors.config import Settings
from flashtensors.transfer import paged_load
from flashtensors.worker.messages import LoadModel, ModelLanded, ModelLoaded, Register, UnloadModel

from counters import Counters  # isort: skip
from worker_thread import Answer, WorkerThread  # isort: skip

GB = 10**9
PROMPT_TOKENS = 128
LONG_PROMPT_TOKENS = 8000
NUM_SWAPS = 6
NUM_ENDURANCE_SWAPS = 1000
VOCAB = 32000


def add_row(**row: Any) -> None:
    """Print a row; the parent collects them."""
    print(json.dumps(row), flush=True)


def settings_for(folder: Path, *, device_bytes: int, host_bytes: int, kv_bytes: int, **more: Any) -> Settings:
    """A worker whose models may take `device_bytes` together."""
    total_bytes = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 16 * GB
    return Settings(
        storage_path=str(folder / "store"),
        gpu_memory_utilization=device_bytes / total_bytes,
        mem_pool_size=host_bytes,
        kv_cache_size=kv_bytes,
        keep_alive_s=-1,
        **more,
    )


def make_prompt(seed: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(num_tokens)]


def register(thread: WorkerThread, folder: Path, *models: str) -> None:
    for model in models:
        thread.send(Register(model=model, folder=str(folder / model)))


def ask(thread: WorkerThread, model: str, seed: int, max_tokens: int = 8, prompt_tokens: int = PROMPT_TOKENS) -> Answer:
    answer = thread.ask(model, make_prompt(seed, prompt_tokens), max_tokens)
    thread.wait(answer)
    return answer


def warm(thread: WorkerThread, models: Sequence[str], rounds: int = 4) -> dict[str, list[int]]:
    """Ask each model in turn until it lies in host memory and has its graphs; returns what each answers to seed 0."""
    for number in range(1, rounds):
        for model in models:
            ask(thread, model, seed=-number)
    return {model: ask(thread, model, seed=0).token_ids for model in models}


def swap_in_turn(
    thread: WorkerThread, models: Sequence[str], link_gb_per_s: float, counters: Counters, case: str
) -> None:
    """Ask models in turn, of which each has to be brought from host memory; nothing may be made for it."""
    answers = warm(thread, models)
    before, first_event = counters.read(), len(thread.events)
    waits_s: dict[str, list[float]] = {model: [] for model in models}
    for number in range(NUM_SWAPS):
        for model in models:
            waits_s[model].append(ask(thread, model, seed=1 + number).first_token_s)
    happened = {name: count for name, count in counters.since(before).items() if count}
    landed = thread.of(ModelLanded, first_event)
    for model in models:
        again = ask(thread, model, seed=0)
        mine = [event for event in landed if event.model == model]
        floor_s = mine[-1].num_bytes / link_gb_per_s / GB if mine else 0.0
        add_row(
            case=case,
            model=model,
            first_token_seconds=spread(waits_s[model]),
            floor_seconds=round(floor_s, 4),
            over_floor_milliseconds=spread([1e3 * (wait_s - floor_s) for wait_s in waits_s[model]]),
            num_swaps=len(mine),
            sources=sorted({event.source for event in mine}),
            phase_seconds=mine[-1].phase_seconds if mine else {},
            same_answer_as_before=again.token_ids == answers[model],
            answer_cached_tokens=again.num_cached_tokens,
            made_during_the_swaps=happened,
        )


def measure_siblings(folder: Path, link_gb_per_s: float) -> None:
    """Two 8B models of one architecture, then one of them and a 1B model, where only one fits at a time.

    No KV cache is kept: an answer behind cached tokens is computed by other kernels, and need not be the same to the
    last bit.
    """
    counters = Counters()
    settings = settings_for(folder, device_bytes=26 * GB, host_bytes=44 * GB, kv_bytes=8 * GB, kv_keep_share=0.0)
    with WorkerThread(settings) as thread:
        register(thread, folder, "8b-a", "8b-b", "1b")
        swap_in_turn(thread, ["8b-a", "8b-b"], link_gb_per_s, counters, "swap to a sibling")
        swap_in_turn(thread, ["8b-a", "1b"], link_gb_per_s, counters, "swap to another architecture")


def measure_large(folder: Path, link_gb_per_s: float) -> None:
    """A 32B model and an 8B model, where only one fits at a time; as `measure_siblings`."""
    counters = Counters()
    settings = settings_for(folder, device_bytes=76 * GB, host_bytes=90 * GB, kv_bytes=4 * GB, kv_keep_share=0.0)
    with WorkerThread(settings) as thread:
        register(thread, folder, "8b-a", "32b")
        swap_in_turn(thread, ["8b-a", "32b"], link_gb_per_s, counters, "swap to another architecture")


def measure_files(folder: Path, link_gb_per_s: float) -> None:
    """Two 8B models of which host memory holds a part and the page cache the rest: how much of a prompt is computed
    before the last byte has come, and what it takes where nothing is before all is read."""
    settings = settings_for(folder, device_bytes=26 * GB, host_bytes=6 * GB, kv_bytes=4 * GB, kv_keep_share=0.0)
    models = ["8b-a", "8b-b"]
    seeds = itertools.count()
    with WorkerThread(settings) as thread:
        register(thread, folder, *models)
        for prompt_tokens in (PROMPT_TOKENS, LONG_PROMPT_TOKENS):
            for model in models * 2:
                ask(thread, model, next(seeds), prompt_tokens=prompt_tokens)
            row: dict[str, Any] = {}
            for way, early_s in (("when all is read", 0.0), ("while it is read", paged_load.EARLY_S)):
                waits_s, landings_s, alone_s = [], [], []
                with mock.patch.object(paged_load, "EARLY_S", early_s):
                    for model in models * 3:
                        first_event = len(thread.events)
                        answer = ask(thread, model, next(seeds), prompt_tokens=prompt_tokens)
                        waits_s.append(answer.first_token_s)
                        alone_s.append(ask(thread, model, next(seeds), prompt_tokens=prompt_tokens).first_token_s)
                        events = thread.events[first_event:]
                        landed_s = next(at_s for at_s, event in events if isinstance(event, ModelLanded))
                        landings_s.append(landed_s - answer.sent_s)
                row[way] = {
                    "first_token_seconds": spread(waits_s),
                    "landed_seconds": spread(landings_s),
                    "prompt_alone_seconds": spread(alone_s),
                }
            add_row(case="host tier in part, page cache", model="8b", prompt_tokens=prompt_tokens, starts=row)


def measure_beside(folder: Path, link_gb_per_s: float, num_sequences: int = 32, window_s: float = 1.5) -> None:
    """Tokens per second of one model, alone and while two others take turns beside it without being asked."""
    # Room for every answer at its full length, so that all of them run from the first step to the last.
    settings = settings_for(folder, device_bytes=78 * GB, host_bytes=60 * GB, kv_bytes=20 * GB, max_model_len=4096)
    with WorkerThread(settings) as thread:
        register(thread, folder, "8b-a", "8b-b", "8b-c")
        thread.obey(LoadModel(model="8b-c", folder=str(folder / "8b-c"), is_pinned=True), ModelLoaded)
        warm(thread, ["8b-a", "8b-b"], rounds=3)
        for model in ("8b-a", "8b-b"):
            thread.obey(UnloadModel(model=model), object)
        running = [thread.ask("8b-c", make_prompt(seed), 3900) for seed in range(num_sequences)]
        while min(len(answer.token_times_s) for answer in running) < 256:  # kernels and graphs of this batch are made
            time.sleep(0.05)
        first_event, beside_s = len(thread.events), 0.0
        alone, beside = [_pace(running, window_s)], []
        for _ in range(3):
            started_s = time.perf_counter()
            beside.append(_pace(running, window_s, lambda: _swap_once(thread, folder)))
            beside_s += time.perf_counter() - started_s
            alone.append(_pace(running, window_s))
        landed = thread.of(ModelLanded, first_event)
        if any(answer.is_over for answer in running):
            raise SystemExit("the answers ended before the measurement")
        # Contexts grow and steps with them: each window is held against those before and after it.
        lost = [
            1 - 2 * during.tokens_per_s / (before.tokens_per_s + after.tokens_per_s)
            for during, before, after in zip(beside, alone, alone[1:], strict=False)
        ]
        add_row(
            case="swap-in beside a decoding model",
            model="8b-c",
            sequences=num_sequences,
            tokens_per_second_alone=[pace.tokens_per_s for pace in alone],
            tokens_per_second_beside_swaps=[pace.tokens_per_s for pace in beside],
            longest_gap_milliseconds_alone=max(1e3 * pace.longest_gap_s for pace in alone),
            longest_gap_milliseconds_beside_swaps=max(1e3 * pace.longest_gap_s for pace in beside),
            lost_share=spread(lost),
            num_swaps=len(landed),
            swapped_gigabytes_per_second=round(sum(event.num_bytes for event in landed) / beside_s / GB, 1),
        )


def _swap_once(thread: WorkerThread, folder: Path) -> None:
    for model, other in (("8b-a", "8b-b"), ("8b-b", "8b-a")):
        thread.obey(UnloadModel(model=other), object)
        thread.obey(LoadModel(model=model, folder=str(folder / model)), ModelLoaded)


@dataclass(frozen=True, slots=True)
class _Pace:
    """How answers came in a window of time."""

    tokens_per_s: float
    longest_gap_s: float
    """Between two steps."""


def _pace(answers: Sequence[Answer], window_s: float, work: Callable[[], None] = lambda: time.sleep(0.05)) -> _Pace:
    """Of answers that run, while `work` is done again and again."""
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < window_s:
        work()
    ended_s = time.perf_counter()
    times_s = [at_s for answer in answers for at_s in list(answer.token_times_s) if started_s <= at_s < ended_s]
    steps_s = sorted(set(times_s))
    gaps_s = [later - earlier for earlier, later in itertools.pairwise([started_s, *steps_s, ended_s])]
    return _Pace(len(times_s) / (ended_s - started_s), max(gaps_s))


def measure_kept(folder: Path, link_gb_per_s: float) -> None:
    """A model that comes back finds the KV cache of its last life, and says what it would have said then.

    In float32, where the order of sums does not turn one token into another.
    """
    settings = settings_for(
        folder, device_bytes=2 * GB, host_bytes=int(3.5 * GB), kv_bytes=256 * 1024**2, kv_keep_share=0.3
    )
    first_s: dict[str, list[float]] = {"without a cache": [], "with the kept cache": []}
    cached: list[float] = []
    num_same = 0
    with WorkerThread(settings) as thread:
        for model in ("half-0", "half-1"):
            thread.send(Register(model=model, folder=str(folder / model), dtype="float32"))
        warm(thread, ["half-0", "half-1"])
        for seed in range(100, 108):
            fresh, again = ask(thread, "half-0", seed), ask(thread, "half-0", seed)
            ask(thread, "half-1", seed)
            returned = ask(thread, "half-0", seed)
            num_same += fresh.token_ids == again.token_ids == returned.token_ids
            cached.append(returned.num_cached_tokens)
            ask(thread, "half-1", seed)
            first_s["without a cache"].append(ask(thread, "half-0", seed + 1000).first_token_s)
            first_s["with the kept cache"].append(returned.first_token_s)
    add_row(
        case="a KV cache that outlives a swap",
        first_token_seconds={name: spread(seconds) for name, seconds in first_s.items()},
        num_prompts=len(cached),
        num_same_answers=num_same,
        cached_tokens=spread(cached),
    )


def measure_endurance(folder: Path, link_gb_per_s: float) -> None:
    """A thousand swaps between two models of 0.5 GB: memory after all of them and after the first ten."""
    counters = Counters()
    settings = settings_for(folder, device_bytes=int(1.1 * GB), host_bytes=3 * GB, kv_bytes=GB // 4)
    with WorkerThread(settings) as thread:
        register(thread, folder, "half-0", "half-1")
        answers = warm(thread, ["half-0", "half-1"])
        readings: list[dict[str, float]] = []
        waits_s: list[float] = []
        before = counters.read()
        started_s = time.perf_counter()
        for number in range(NUM_ENDURANCE_SWAPS):
            waits_s.append(ask(thread, f"half-{number % 2}", seed=number, max_tokens=2).first_token_s)
            if number + 1 in (10, NUM_ENDURANCE_SWAPS):
                readings.append(_memory())
        seconds = time.perf_counter() - started_s
        happened = {name: count for name, count in counters.since(before).items() if count}
        is_same = all(ask(thread, model, seed=0).token_ids == answers[model] for model in answers)
        num_swaps = len(thread.of(ModelLanded))
    after_10, after_all = readings
    add_row(
        case="1,000 swaps",
        num_swaps=num_swaps,
        swaps_per_second=round(NUM_ENDURANCE_SWAPS / seconds, 1),
        first_token_seconds=spread(waits_s),
        after_10=after_10,
        after_all=after_all,
        grown_share={name: round(after_all[name] / after_10[name] - 1, 5) for name in after_10},
        same_answer_as_before=is_same,
        made_during_the_swaps=happened,
    )


def _memory() -> dict[str, float]:
    """Bytes in use on the device, and of this process in host memory."""
    torch.cuda.synchronize()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return {"device_bytes": total_bytes - free_bytes, "host_bytes": pages * resource.getpagesize()}


PHASES = {
    "siblings": measure_siblings,
    "large": measure_large,
    "files": measure_files,
    "beside": measure_beside,
    "kept": measure_kept,
    "endurance": measure_endurance,
}


def main(phase: str, folder: str, link_gb_per_s: str) -> None:
    PHASES[phase](Path(folder), float(link_gb_per_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
