"""Real models on a real worker, and everything that can happen to them at once: who is answered, and what is left.

Five tiny models share a device that holds two. Requests, cancels, loads, unloads, prefetches, changed files and failing
reads come in random order while threads plan, read and drop. Whatever happens, each answer is token for token that of
its model alone, every request ends once, and at the end memory, threads and descriptors are what they were.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from flashtensors.config import Settings
from flashtensors.errors import FlashError, TransferError, WorkerError
from flashtensors.kernels import linear
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer.readers.buffered import BufferedReader
from flashtensors.transfer.readers.direct import DirectReader
from flashtensors.worker.checkpoint_loader import CheckpointLoader
from flashtensors.worker.device import Device
from flashtensors.worker.harbour import Harbour
from flashtensors.worker.host import Worker
from flashtensors.worker.messages import (
    Abort,
    Command,
    Deltas,
    Event,
    Forget,
    Generate,
    KeepAlive,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    Prefetch,
    Prefetched,
    Register,
    RequestFailed,
    UnloadModel,
)

from .harbours import HANDLE_BYTES, RING_PAGES, make_harbour, make_loader

FAMILIES = {"a": "llama", "b": "llama", "c": "qwen3", "d": "gemma3_text", "e": "qwen3_moe"}
"""Two of them may share a dock."""
PROMPTS = [[5, 9, 17, 3], [5, 9, 17, 3, *range(20, 60)], [*range(100, 180)]]
MAX_TOKENS = 12
KV_BYTES = 512 * 1024
NUM_HANDLES = 26
"""A docked model takes 9 to 13 of them, most for its KV cache."""
IMAGE_PAGES = 20
"""Of the host tier: two or three of the models."""
UNTYPED = {FlashError.code, WorkerError.code}


@dataclass
class Disk:
    """The checkpoints, and reads that fail now and then."""

    folder: Path
    random: random.Random
    failure_rate: float = 0.0
    generation: Counter[str] = field(default_factory=Counter)

    def path(self, model: str) -> Path:
        return self.folder / f"{model}{self.generation[model] % 2}"

    def fail_sometimes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for reader in (BufferedReader, DirectReader):
            monkeypatch.setattr(reader, "read_into", self._failing(reader.read_into))

    def _failing(self, read_into: Callable[..., None]) -> Callable[..., None]:
        def read(reader: object, path: Path, offset: int, buffer: memoryview) -> None:
            if self.random.random() < self.failure_rate:
                raise TransferError(f"{path}: the disk is on fire")
            read_into(reader, path, offset, buffer)

        return read


def write_models(folder: Path) -> None:
    """Each model twice: before and after it changes."""
    for seed, (model, family) in enumerate(FAMILIES.items()):
        for generation in range(2):
            config = tiny_config(family, vocab_size=304, tie_word_embeddings=False)
            write_tiny_checkpoint(folder / f"{model}{generation}", config, seed=10 * seed + generation)


def ask(name: str, model: str, prompt: list[int], *, n: int = 1, is_streamed: bool = False) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, n=n)
    return EngineRequest(
        request_id=name, model=model, prompt_token_ids=prompt, sampling=sampling, is_streamed=is_streamed
    )


class Soak:
    """A worker, what was asked of it, and what it said."""

    def __init__(self, worker: Worker, bell: threading.Semaphore, disk: Disk) -> None:
        self.worker = worker
        self.disk = disk
        self.events: list[Event] = []
        self.requests: dict[str, EngineRequest] = {}
        self.open: set[tuple[str, int]] = set()
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}
        self.waiting: Counter[type] = Counter()
        self.unloading: set[str] = set()
        self._bell = bell

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.worker.handle(command)

    def generate(self, request: EngineRequest) -> None:
        self.requests[request.request_id] = request
        for index in range(request.sampling.n):
            self.open.add((request.request_id, index))
            self.tokens[request.request_id, index] = []
        self.send(Generate(request=request))

    def register(self, model: str) -> None:
        self.send(Register(model=model, folder=str(self.disk.path(model))))

    def load(self, model: str, *, is_pinned: bool = False) -> None:
        self.waiting[ModelLoaded] += 1
        self.send(LoadModel(model=model, folder=str(self.disk.path(model)), keep_alive_s=0.05, is_pinned=is_pinned))

    def unload(self, model: str) -> None:
        self.unloading.add(model)
        self.send(UnloadModel(model=model))

    def prefetch(self, model: str) -> None:
        self.waiting[Prefetched] += 1
        self.send(Prefetch(model=model))

    def step(self) -> bool:
        is_busy = self.worker.step()
        events, self.events = self.events, []
        for event in events:
            self._take(event)
        return is_busy

    def wait(self, timeout_s: float) -> None:
        """As the worker's loop sleeps."""
        self._bell.acquire(timeout=timeout_s)

    def settle(self) -> None:
        """Until everybody was answered."""
        for _ in range(2000):
            if not self.step():
                if not (self.open or self.unloading or self.waiting.total()):
                    return
                self.wait(0.02)
        raise AssertionError(f"never answered: {sorted(self.open)} {self.unloading} {self.waiting}")

    def _take(self, event: Event) -> None:
        match event:
            case Deltas(deltas=deltas):
                for delta in deltas:
                    answer = delta.request_id, delta.index
                    assert answer in self.open, f"{answer} has ended already: {self.ended.get(answer)}"
                    self.tokens[answer] += delta.token_ids
                    if delta.finish_reason is not None:
                        self.open.remove(answer)
                        self.ended[answer] = delta.finish_reason
            case RequestFailed(request_id=name, error=error):
                assert error.code not in UNTYPED, error
                answers = {answer for answer in self.open if answer[0] == name}
                assert answers, f"{name} has ended already"
                self.open -= answers
                self.ended |= dict.fromkeys(answers, f"{error.code}: {error.message}")
            case ModelLoaded() | LoadFailed():
                self.waiting[ModelLoaded] -= 1
            case Prefetched():
                self.waiting[Prefetched] -= 1
            case ModelUnloaded(model=model):  # the reason is why it left, which may not be the unload
                self.unloading.discard(model)
            case _:
                pass


def play(soak: Soak, rng: random.Random, num_events: int) -> None:
    """Random events, each followed by a few steps."""
    for number in range(num_events):
        model = rng.choice("aaabbcde")
        what = rng.random()
        if what < 0.55:
            prompt = rng.choice(PROMPTS)
            soak.generate(
                ask(f"{model}{number}", model, prompt, n=rng.choice([1, 1, 3]), is_streamed=rng.random() < 0.3)
            )
        elif what < 0.65 and soak.open:
            name, index = rng.choice(sorted(soak.open))
            soak.send(Abort(request_id=name, index=rng.choice([None, index])))
        elif what < 0.72:
            soak.load(model, is_pinned=rng.random() < 0.2)
        elif what < 0.78:
            soak.unload(model)
        elif what < 0.86:
            soak.prefetch(model)
        elif what < 0.9:
            soak.send(KeepAlive(model=model, keep_alive_s=rng.choice([0.0, 0.02, -1.0])))
        elif what < 0.93:
            soak.send(Forget(model=model))
            soak.disk.generation[model] += rng.random() < 0.5
            soak.register(model)
        else:
            soak.disk.failure_rate = rng.choice([0.0, 0.0, 0.05])
        for _ in range(rng.choice([0, 1, 3, 10])):
            if not soak.step():
                soak.wait(0.001)


def check_answers(soak: Soak, answers: dict[tuple[str, tuple[int, ...]], list[list[int]]]) -> None:
    for answer, got in soak.tokens.items():
        request = soak.requests[answer[0]]
        wanted = answers[request.model, tuple(request.prompt_token_ids)]
        assert any(got == each[: len(got)] for each in wanted), f"{answer}: {got}, not one of {wanted}"
        if soak.ended[answer] == "length":
            assert got in wanted, f"{answer} is not whole"


@contextmanager
def nothing_left() -> Iterator[None]:
    """Without a collection of garbage: a model's memory must not wait for one."""
    gc.collect()
    gc.disable()
    threads, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    try:
        yield
        assert set(threading.enumerate()) == threads
        assert len(os.listdir("/proc/self/fd")) == fds
        assert ".safetensors" not in Path("/proc/self/maps").read_text(encoding="utf-8")
    finally:
        gc.enable()


def make_soak(kind: str, disk: Disk, store: Path) -> tuple[Soak, Harbour | None]:
    bell = threading.Semaphore(0)
    harbour = None
    if kind == "docked":
        harbour = make_harbour(num_handles=NUM_HANDLES, num_pages=IMAGE_PAGES + RING_PAGES)
        loader = make_loader(harbour, store, kv_cache_size=KV_BYTES)
        budget_bytes = NUM_HANDLES * HANDLE_BYTES
    else:
        budget_bytes = 2 * (KV_BYTES + 600 * 1024)
        settings = Settings(device="cpu", storage_path=str(store), kv_cache_size=KV_BYTES, max_num_seqs=4)
        loader = CheckpointLoader(
            settings, Device(name="cpu", description="", budget_bytes=budget_bytes), max_queue=None
        )
    soak: Soak
    worker = Worker(
        Settings(device="cpu", kv_keep_share=0.35, swap_patience_s=0.05, keep_alive_s=0.5),
        emit=lambda event: soak.events.append(event),
        wake=bell.release,
        device=loader.device,
        loader=loader,
        images=loader.host_tier,
    )
    soak = Soak(worker, bell, disk)
    return soak, harbour


def find_answers(disk: Disk, store: Path) -> dict[tuple[str, tuple[int, ...]], list[list[int]]]:
    """Greedy answers of every model before and after it changes, each alone."""
    answers: dict[tuple[str, tuple[int, ...]], list[list[int]]] = {}
    for generation in range(2):
        disk.generation = Counter(dict.fromkeys(FAMILIES, generation))
        soak, _ = make_soak("mapped", disk, store)
        for model in FAMILIES:
            soak.register(model)
            for prompt in PROMPTS:
                soak.generate(ask("r", model, prompt))
                soak.settle()
                answers.setdefault((model, tuple(prompt)), []).append(soak.tokens["r", 0])
        soak.worker.close()
    disk.generation.clear()
    return answers


@pytest.mark.parametrize(
    ("seed", "num_events"), [(0, 150), *(pytest.param(seed, 1500, marks=pytest.mark.slow) for seed in range(1, 5))]
)
@pytest.mark.parametrize("kind", ["mapped", "docked"])
def test_whatever_happens(
    kind: str, seed: int, num_events: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(linear, "_can_pack", lambda dtype: False)  # packed copies would not change with their dock
    rng = random.Random(seed)
    disk = Disk(tmp_path, random.Random(seed))
    write_models(tmp_path)
    answers = find_answers(disk, tmp_path / "store")
    disk.fail_sometimes(monkeypatch)
    with nothing_left():
        soak, harbour = make_soak(kind, disk, tmp_path / "store")
        for model in FAMILIES:
            soak.register(model)
        play(soak, rng, num_events)
        disk.failure_rate = 0.0
        soak.settle()
        check_answers(soak, answers)
        for model in FAMILIES:
            soak.unload(model)  # pinned ones would leave no room
        for model in FAMILIES:  # each can be asked again
            soak.register(model)
            soak.generate(ask(f"last {model}", model, PROMPTS[1]))
            soak.settle()
            assert soak.ended[f"last {model}", 0] == "length"
        check_answers(soak, answers)
        for model in FAMILIES:
            soak.unload(model)
            soak.send(Forget(model=model))
        soak.settle()
        residency = soak.worker._models.residency
        assert residency.device.free_bytes == residency.device.capacity_bytes
        assert residency.host.free_bytes == residency.host.capacity_bytes
        if harbour is not None:
            assert harbour.docks.pool.free_bytes == NUM_HANDLES * HANDLE_BYTES
            assert harbour.tier.pool is not None
            assert harbour.tier.pool.free_bytes == harbour.tier.pool.num_bytes
        soak.worker.close()
        del soak, residency, harbour
