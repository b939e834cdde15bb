"""Loads of one model from every tier, timed as the worker itself reports them, beside this machine's limits."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from ..config import Settings
from ..errors import WorkerError
from ..transfer.readers.page_cache import PageCache
from .device import find_cuda_index
from .embedded import EmbeddedWorker
from .machine_limits import cached_read_rate, copy_rate, disk_read_rate, drop_page_cache
from .messages import Event, LoadModel, ModelLanded, ModelUnloaded

RING_BYTES = 256 * 1024**2
"""Host memory of a worker that keeps no image: its bytes only pass through."""
UNLOAD_TIMEOUT_S = 60.0
_LIMIT_THREADS = 16

_Event = TypeVar("_Event", ModelLanded, ModelUnloaded)


class LoadTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One load."""

    tier: str
    """`disk`, `page cache` or `host memory`."""
    num_bytes: int
    seconds: float
    reader: str
    phase_seconds: dict[str, float]

    @property
    def bytes_per_s(self) -> float:
        """What was reached, from the wish to the last byte."""
        return self.num_bytes / max(1e-9, self.seconds)


class MachineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes a second that loads are held against."""

    copy: float
    """Page-locked memory to the GPU; on a CPU, memory to memory."""
    page_cache: float
    disk: float | None
    """None: the file system cannot be read past the page cache."""


def run_load_trials(settings: Settings, model: str, folder: Path, *, num_runs: int) -> Iterator[LoadTrial]:
    """Load a model `num_runs` times from each tier that this machine has, slowest tier first.

    Raises:
        FlashError: A load failed, or there is no room for the model.
    """
    paths = weight_paths(folder)
    image_bytes = sum(path.stat().st_size for path in paths)
    with _TrialWorker(settings, model, folder, pool_bytes=RING_BYTES) as worker:
        for _ in range(num_runs):
            drop_page_cache(paths)
            yield worker.load("disk")
        worker.load("page cache")
        for _ in range(num_runs):
            yield worker.load("page cache")
    if _device_of(settings).type == "cpu":
        return  # models are used where the page cache has them; there is no tier of our own
    with _TrialWorker(settings, model, folder, pool_bytes=image_bytes * 5 // 4 + RING_BYTES) as worker:
        worker.load("page cache")
        for _ in range(num_runs):
            yield worker.load("host memory")


def measure_limits(settings: Settings, folder: Path) -> MachineLimits:
    """Measure what this machine can do with the files of one model."""
    paths = weight_paths(folder)
    drop_page_cache(paths)
    disk = disk_read_rate(paths, _LIMIT_THREADS)
    device = _device_of(settings)
    limits = MachineLimits(
        disk=disk,
        page_cache=cached_read_rate(paths, _LIMIT_THREADS),
        copy=copy_rate(device, sum(path.stat().st_size for path in paths)),
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a worker comes next, and wants the memory
    return limits


def cached_share(folder: Path) -> float | None:
    """Share of a model's weights that the page cache holds; None where the kernel does not say."""
    page_cache, cached_bytes, total_bytes = PageCache(), 0.0, 0
    for path in weight_paths(folder):
        num_bytes, share = path.stat().st_size, page_cache.find_file_share(path)
        if share is None:
            return None
        cached_bytes, total_bytes = cached_bytes + share * num_bytes, total_bytes + num_bytes
    return cached_bytes / max(1, total_bytes)


def weight_paths(folder: Path) -> list[Path]:
    """The files that hold a model's weights, with links followed."""
    return sorted(path.resolve() for path in folder.glob("*.safetensors"))


class _TrialWorker:
    """A worker of its own that loads and unloads one model."""

    def __init__(self, settings: Settings, model: str, folder: Path, *, pool_bytes: int) -> None:
        if _device_of(settings).type != "cpu":  # on a CPU this setting bounds the models themselves
            settings = msgspec.structs.replace(settings, mem_pool_size=pool_bytes)
        self._command = LoadModel(model=model, folder=str(folder), keep_alive_s=-1.0)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._worker = EmbeddedWorker(settings, on_event=self._events.put)

    def __enter__(self) -> _TrialWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def load(self, tier: str) -> LoadTrial:
        """Load and unload once."""
        self._worker.load(self._command)
        landed = self._wait_for(ModelLanded)
        self._worker.unload(self._command.model)
        self._wait_for(ModelUnloaded)
        return LoadTrial(
            tier=tier,
            num_bytes=landed.num_bytes,
            seconds=landed.total_s,
            reader=landed.reader,
            phase_seconds=landed.phase_seconds,
        )

    def _wait_for(self, kind: type[_Event]) -> _Event:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get(timeout=UNLOAD_TIMEOUT_S)
                if isinstance(event, kind):
                    return event
        raise WorkerError(f"the worker did not say {kind.__name__} within {UNLOAD_TIMEOUT_S:.0f} s")


def _device_of(settings: Settings) -> torch.device:
    index = find_cuda_index(settings)
    return torch.device("cpu") if index is None else torch.device("cuda", index)
