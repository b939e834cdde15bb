"""Plans, loads, fills and drops in threads, so that other models keep answering while bytes move."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..errors import CapacityError, FlashError
from ..transfer.pipeline import LoadStats
from .loading import Grant, KeptKv, LoadedModel, Loader, PlannedModel
from .messages import LoadModel, LoadProgress, Register

_log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.1
"""Least time between two reports of one load's progress."""


@dataclass(frozen=True)
class Planned:
    """A plan is ready."""

    model: str
    planned: PlannedModel
    seconds: float


@dataclass(frozen=True)
class Ready:
    """Requests of a model may be started; `Landed` or `Failed` follows."""

    model: str
    loaded: LoadedModel


@dataclass(frozen=True)
class Landed:
    """Every byte of a model is on the device."""

    model: str
    stats: LoadStats


@dataclass(frozen=True)
class Filled:
    """A fill has ended, at its end or because it was cancelled."""

    model: str


@dataclass(frozen=True)
class Dropped:
    """A model has left the device, but for the KV cache that it was told to keep."""

    model: str
    kept: KeptKv | None


@dataclass(frozen=True)
class DropFailed:
    """A model could not give its memory back: nothing on the device can be relied on."""

    model: str
    error: Exception


@dataclass(frozen=True)
class Failed:
    """A plan, a load or a fill failed. Without a `Ready` before, nothing is held on the device for it."""

    model: str
    error: FlashError


Report = Planned | Ready | Landed | Filled | Dropped | DropFailed | Failed | LoadProgress


class BackgroundLoads:
    """Runs plans, loads, fills and drops, one thread each, and collects their reports for the worker's own thread.

    Args:
        loader: What plans.
        wake: Called in the thread when there is a report to take.
    """

    def __init__(self, loader: Loader, wake: Callable[[], None]) -> None:
        self._loader = loader
        self._wake = wake
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._cancels: dict[str, threading.Event] = {}

    def expect(self, command: Register | LoadModel) -> None:
        """Tell the loader of a model that became known."""
        self._loader.expect(command)

    def start_plan(self, model: str, find_command: Callable[[], LoadModel]) -> None:
        """Plan a model; ends in `Planned`, or in `Failed`, also where nobody knows the model any more."""
        started_s = time.perf_counter()

        def plan() -> Report:
            planned = self._loader.plan(find_command())
            return Planned(model, planned, time.perf_counter() - started_s)

        self._start(model, plan)

    def start_load(self, model: str, planned: PlannedModel, grant: Grant) -> None:
        """Load a planned model; ends in `Landed` or `Failed`, mostly with a `Ready` before."""
        progress = _ThrottledProgress(model, self._report)
        cancel = self._cancels[model] = threading.Event()

        def load() -> Report:
            stats = planned.load(grant, progress, cancel, lambda loaded: self._report(Ready(model, loaded)))
            return Landed(model, stats)

        self._start(model, load)

    def start_fill(self, model: str, planned: PlannedModel, host_bytes: int) -> None:
        """Read a planned model into host memory; ends in `Filled` or `Failed`."""
        progress = _ThrottledProgress(model, self._report)
        cancel = self._cancels[model] = threading.Event()

        def fill() -> Report:
            try:
                planned.fill(host_bytes, progress, cancel)
            except FlashError:
                if not cancel.is_set():
                    raise
            return Filled(model)

        self._start(model, fill)

    def start_drop(self, model: str, loaded: LoadedModel, *, keeps_kv: bool, is_broken: bool) -> None:
        """Give a model's memory back, which takes milliseconds for many gigabytes; ends in `Dropped`.

        Steps that were launched before its last answer turned out to have ended are waited for first, in the caller's
        thread, unless the model is broken.
        """
        if not is_broken:
            _drain(model, loaded)
        last = [loaded]  # given up with the memory, so that nothing of the model outlives it

        def drop() -> Report:
            try:
                return Dropped(model, last.pop().close(keeps_kv=keeps_kv))
            except Exception as error:
                return DropFailed(model, error)

        self._start(model, drop)

    def cancel(self, model: str) -> None:
        """Make a load or a fill of `model` end soon, where one runs."""
        if model in self._cancels:
            self._cancels[model].set()

    def cancel_all(self) -> None:
        """Make all loads and fills end soon."""
        for cancel in self._cancels.values():
            cancel.set()

    def reports(self) -> Iterator[Report]:
        """Take what has been reported since the last call."""
        while not self._reports.empty():
            yield self._reports.get()

    def join(self) -> None:
        """Wait until no thread runs any more."""
        for thread in self._threads:
            thread.join()

    def _start(self, model: str, work: Callable[[], Report]) -> None:
        thread = threading.Thread(target=self._run, args=(model, work), name=f"load {model}", daemon=True)
        self._threads = {each for each in self._threads if each.is_alive()} | {thread}
        thread.start()

    def _run(self, model: str, work: Callable[[], Report]) -> None:
        self._report(_find_report(model, work))  # not kept here: an error would hold this frame, and this frame it

    def _report(self, report: Report) -> None:
        self._reports.put(report)
        self._wake()


def _find_report(model: str, work: Callable[[], Report]) -> Report:
    try:
        return work()
    except FlashError as error:
        return Failed(model, error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return Failed(model, CapacityError(f"{model}: out of memory while loading: {error}; unload a model"))
    except Exception as error:
        _log.exception("loading %s failed", model)
        return Failed(model, FlashError(f"{model}: loading failed: {type(error).__name__}: {error}"))


def _drain(model: str, loaded: LoadedModel) -> None:
    try:
        loaded.engine.drain()
    except Exception:  # nobody waits for these steps, and whoever closes the model sees that they did not end
        _log.exception("%s: a step failed", model)


class _ThrottledProgress:
    """Passes on the first report, the last one of each phase, and between them one every `PROGRESS_INTERVAL_S`."""

    def __init__(self, model: str, report: Callable[[Report], None]) -> None:
        self._model = model
        self._report = report
        self._last_s = float("-inf")
        self._last_phase = ""
        self._rate = _RateSoFar()

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        self._rate.observe(done_bytes, now_s)
        if phase == self._last_phase and done_bytes < total_bytes and now_s - self._last_s < PROGRESS_INTERVAL_S:
            return
        self._last_s, self._last_phase = now_s, phase
        self._report(
            LoadProgress(
                model=self._model,
                phase=phase,
                done_bytes=done_bytes,
                total_bytes=total_bytes,
                bytes_per_s=self._rate.bytes_per_s,
            )
        )


class _RateSoFar:
    """Bytes per second between the first report and the last one that had more.

    What was there at the first report may never have moved: weights that stay in their files are done at once.
    """

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        """None: reports of less than `PROGRESS_INTERVAL_S` so far."""
        self._first: tuple[int, float] | None = None
        self._last_bytes = 0

    def observe(self, done_bytes: int, now_s: float) -> None:
        """Take in a report."""
        if self._first is None:
            self._first, self._last_bytes = (done_bytes, now_s), done_bytes
        first_bytes, first_s = self._first
        if done_bytes > self._last_bytes and now_s - first_s >= PROGRESS_INTERVAL_S:
            self._last_bytes = done_bytes
            self.bytes_per_s = (done_bytes - first_bytes) / (now_s - first_s)
