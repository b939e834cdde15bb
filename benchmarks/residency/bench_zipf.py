"""A hundred fine-tunes of half a gigabyte behind one device that holds two dozen: how long does who wait?

Requests come as a Poisson process, for models whose popularity falls as Zipf's law says; most weights lie on disk. Time
to the first token is told apart by where the model was when the request came, and each wait is held against what the
residency machine promises. Swaps are held against those of policies that know the trace: one that knows when each model
is wanted, and one that knows how often. Models share the bytes of their files in fives, to spare the disk; the loader
does not know that.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "transfer"))
from record import report

from flashtensors.config import Settings
from flashtensors.residency.rates import Rates
from flashtensors.worker.messages import Deltas, FirstToken, ModelLanded, ModelReady, Register
from flashtensors.worker.stats import Stats

from checkpoints import write_model  # isort: skip
from counters import Counters  # isort: skip
from machine_limits import drop_page_cache  # isort: skip
from waiting_bound import Load, bound_measured, compare, find_patience_s  # isort: skip
from worker_thread import Answer, WorkerThread  # isort: skip
from zipf_trace import Arrival, count_offline_swaps, make_trace  # isort: skip

GB = 10**9
SHARING = 5
"""Models whose files are links to the same bytes."""


def write_models(folder: Path, num_models: int) -> None:
    """Models of 0.5 GB, and none of them in the page cache."""
    for model in range(num_models):
        first = model - model % SHARING
        path = folder / f"m{model}"
        if model == first:
            write_model("half-gigabyte", path, seed=model)
            continue
        path.mkdir()
        for file in (folder / f"m{first}").iterdir():
            (path / file.name).hardlink_to(file)
    drop_page_cache(sorted(folder.glob("*/*.safetensors")))


def replay(thread: WorkerThread, trace: Sequence[Arrival], prompt_tokens: int, max_tokens: int) -> list[Answer]:
    """Send every request when its time has come; returns when all are answered."""
    rng = random.Random(0)
    prompts = [[rng.randrange(2, 60_000) for _ in range(prompt_tokens)] for _ in range(64)]
    answers: list[Answer] = []
    started_s = time.perf_counter()
    for index, arrival in enumerate(trace):
        time.sleep(max(0.0, started_s + arrival.time_s - time.perf_counter()))
        answers.append(thread.ask(f"m{arrival.model}", prompts[index % len(prompts)], max_tokens))
    thread.wait(*answers)
    return answers


class TierNotes:
    """What the worker says of first tokens."""

    def __init__(self, thread: WorkerThread) -> None:
        self.notes: list[FirstToken] = []
        self._lock = threading.Lock()
        thread.on_deltas = self._take

    def _take(self, event: Deltas) -> None:
        with self._lock:
            self.notes += event.first_tokens


def summarise(waits_s: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    ordered = sorted(waits_s)
    return {
        "num": len(ordered),
        "p50_ms": round(1e3 * statistics.median(ordered), 2),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
        "max_ms": round(1e3 * ordered[-1], 2),
    }


def compare_waits(
    thread: WorkerThread,
    answers: Sequence[Answer],
    notes: Sequence[FirstToken],
    patience_s: float | None,
    weight_bytes: int,
) -> dict[str, Any]:
    """Hold what each request waited against what the residency machine promises."""
    patiences: list[tuple[float, float]] = []
    loads: list[Load] = []
    plan_s = 0.0
    for time_s, event in thread.events:
        if isinstance(event, Stats):
            rates = Rates(event.link_bytes_per_s, event.disk_bytes_per_s)
            patiences.append((time_s, find_patience_s(rates, weight_bytes, patience_s)))
        elif isinstance(event, ModelLanded):
            moved_s = sum(seconds for phase, seconds in event.phase_seconds.items() if phase not in ("queue", "plan"))
            loads.append(Load(time_s - moved_s, time_s))
            plan_s = max(plan_s, event.phase_seconds.get("plan", 0.0))
    served = {note.request_id for note in notes if note.tier == "device"}
    at_once = [answer for answer in answers if answer.request_id in served]
    answer_s = max((answer.token_times_s[-1] - answer.sent_s for answer in at_once), default=0.0)
    own_s = plan_s + max((answer.first_token_s for answer in at_once), default=0.0)
    bounds_s = [
        bound_measured(
            answer.sent_s,
            answer.token_times_s[0],
            patiences=patiences,
            loads=loads,
            answer_s=answer_s,
            own_s=own_s,
        )
        for answer in answers
    ]
    waits_s = [answer.first_token_s for answer in answers]
    return compare(waits_s, bounds_s) | {"longest_answer_s": round(answer_s, 3)}


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    trace = make_trace(
        num_models=args.models,
        exponent=args.exponent,
        requests_per_s=args.rate,
        duration_s=args.seconds,
        seed=args.seed,
    )
    total_bytes = torch.cuda.mem_get_info()[1]
    settings = Settings(
        storage_path=str(folder / "store"),
        gpu_memory_utilization=args.device_gb * GB / total_bytes,
        mem_pool_size=int(args.host_gb * GB),
        kv_cache_size=int(args.kv_mb * 10**6),
        max_model_len=2048,
        keep_alive_s=-1,
    )
    counters = Counters()
    with WorkerThread(settings) as thread:
        tiers = TierNotes(thread)
        for model in range(args.models):
            thread.send(Register(model=f"m{model}", folder=str(folder / f"m{model}")))
        thread.wait(thread.ask("m0", list(range(2, 66)), 4))
        before, first = counters.read(), len(thread.events)
        first_note = len(tiers.notes)
        answers = replay(thread, trace, args.prompt_tokens, args.tokens)
        happened = counters.since(before)
        notes = tiers.notes[first_note:]
        landed = thread.of(ModelLanded, first)
        ready = thread.of(ModelReady)[-1]
    num_places = int(args.device_gb * GB // (ready.weight_bytes + ready.kv_cache_bytes))
    answer_s = statistics.median(answer.token_times_s[-1] - answer.token_times_s[0] for answer in answers)
    swap_s = statistics.median(event.total_s for event in landed)
    clairvoyant = count_offline_swaps(trace, num_places, swap_s=swap_s, answer_s=answer_s)
    by_count = count_offline_swaps(trace, num_places, knows_arrivals=False, swap_s=swap_s, answer_s=answer_s)
    rows: list[dict[str, Any]] = [
        {"case": "all requests", **summarise([answer.first_token_s for answer in answers])},
        *(
            {"case": f"model was on {tier}", **summarise(waits_s)}
            for tier in ("device", "host", "disk")
            if (waits_s := [note.seconds for note in notes if note.tier == tier])
        ),
        {"case": "waiting", **compare_waits(thread, answers, notes, settings.swap_patience_s, ready.weight_bytes)},
        {
            "case": "swaps",
            "num": len(landed),
            "places": num_places,
            "of_who_knows_arrivals": clairvoyant,
            "of_who_knows_popularity": by_count,
            "ratio_to_arrivals": round(len(landed) / clairvoyant, 3),
            "ratio_to_popularity": round(len(landed) / by_count, 3),
            "median_seconds": round(swap_s, 4),
            "sources": {source: sum(event.source == source for event in landed) for source in ("host", "disk")},
        },
        {
            "case": "answers",
            "answered": sum(answer.is_over and answer.error is None for answer in answers),
            "asked": len(trace),
            "tokens_each": sorted({len(answer.token_ids) for answer in answers}),
            "made_meanwhile": {name: count for name, count in happened.items() if count},
        },
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--exponent", type=float, default=1.1)
    parser.add_argument("--rate", type=float, default=10.0, help="Requests per second.")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--tokens", type=int, default=32, help="Of each answer.")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--device-gb", type=float, default=12.0)
    parser.add_argument("--host-gb", type=float, default=24.0)
    parser.add_argument("--kv-mb", type=float, default=134.3, help="KV cache of each model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="A folder on a disk with room for 12 GB.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        write_models(Path(scratch), args.models)
        rows = measure(args, Path(scratch))
    for row in rows:
        print(row, flush=True)
    report("zipf", rows, **{name: value for name, value in vars(args).items() if name != "scratch"})


if __name__ == "__main__":
    main()
