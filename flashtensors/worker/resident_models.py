"""The models of one device: carries out what the residency machine decides, and reports back to it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from typing import assert_never

from ..errors import ConfigError, FlashError
from ..residency.actions import Action, AdmitLoad, AnswerLoad, Drop, ReportUnload, StartLoad
from ..residency.machine import Residency
from ..residency.tiers import State
from .background import BackgroundLoads, Failed, Loaded, Planned, Report
from .device import Device
from .loading import LoadedModel, PlannedModel
from .messages import (
    Event,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    ModelStats,
    ModelUnloaded,
    Stats,
    WireError,
)


class ResidentModels:
    """Loads, drops and counts models; emits an event for each change.

    Args:
        residency: Decides.
        loads: Plans and reads in threads.
        device: Where the memory is.
        emit: Called with every event.
        clock: Seconds.
    """

    def __init__(
        self,
        residency: Residency,
        loads: BackgroundLoads,
        device: Device,
        *,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.loaded: dict[str, LoadedModel] = {}
        """Models on the device, by name; those that leave but still run requests among them."""
        self.num_changes = 0
        """Counts up with everything that changes what is loaded."""
        self._residency = residency
        self._loads = loads
        self._device = device
        self._emit = emit
        self._clock = clock
        self._tickets = itertools.count()
        self._wanted: dict[str, LoadModel] = {}
        self._planned: dict[str, PlannedModel] = {}

    # What callers ask.

    def load(self, command: LoadModel) -> None:
        """Make a model ready; answered by an event."""
        model = command.model
        wanted = self._wanted.get(model)
        if wanted is None or self.state(model) in (State.ABSENT, State.UNLOADING):
            self._wanted[model] = command
        elif conflict := _find_conflict(command, wanted):
            error = ConfigError(f"{model} is loaded with another {conflict}; unload it first", param=conflict)
            self._emit(LoadFailed(model=model, error=WireError.of(error)))
            return
        self._perform(
            self._residency.load(
                next(self._tickets),
                model,
                self._clock(),
                keep_alive_s=command.keep_alive_s,
                is_pinned=command.is_pinned,
            )
        )

    def unload(self, model: str) -> None:
        """Drop a model once its requests have ended; answered by an event. A load that runs is cancelled."""
        self._loads.cancel(model)
        self._perform(self._residency.unload(next(self._tickets), model, self._clock()))

    def fail(self, model: str) -> None:
        """Drop a model whose state is broken, once its leases are returned."""
        self._perform(self._residency.unload(None, model, self._clock(), reason="failed"))

    def set_keep_alive(self, model: str, keep_alive_s: float) -> None:
        """Change how long a model stays when idle; ignored where it is not there."""
        self._perform(self._residency.set_keep_alive(model, keep_alive_s, self._clock()))

    def state(self, model: str) -> State:
        """How far a model is."""
        return self._residency.state(model)

    def acquire(self, model: str) -> LoadedModel | None:
        """Keep a ready model for one request; None when it is not ready."""
        return self.loaded[model] if self._residency.acquire(model, self._clock()) else None

    def release(self, model: str) -> None:
        """A request has ended."""
        self._perform(self._residency.release(model, self._clock()))

    def next_deadline(self) -> float | None:
        """When `advance` must be called though nothing happens."""
        return self._residency.next_deadline_s()

    def advance(self) -> None:
        """Take in what threads report and what time brings."""
        for report in self._loads.reports():
            self._take_report(report)
        self._perform(self._residency.tick(self._clock()))

    def stats(self) -> Stats:
        """State of every model."""
        now_s = self._clock()
        models = [self._model_stats(model, loaded, now_s) for model, loaded in self.loaded.items()]
        loading = self._residency.models_in(State.LOADING)
        return Stats(models=models, loading=loading, free_bytes=self._residency.free_bytes)

    def close(self, error: FlashError) -> None:
        """Fail loads that run, wait for their threads, and give all memory back."""
        for model in self._residency.models_in(State.LOADING):
            self._loads.cancel(model)
            self._emit(LoadFailed(model=model, error=WireError.of(error)))
        self._loads.join()
        for report in self._loads.reports():
            if isinstance(report, Loaded):
                report.loaded.close()
        for model in list(self.loaded):
            self._drop(model)

    # What the machine decides.

    def _perform(self, actions: Iterable[Action]) -> None:
        """Carry out actions, and those that follow from them."""
        pending = deque(actions)
        while pending:
            self.num_changes += 1
            pending.extend(self._perform_one(pending.popleft()))

    def _perform_one(self, action: Action) -> list[Action]:
        match action:
            case StartLoad(model=model):
                self._loads.start_plan(self._wanted[model])
            case AdmitLoad(model=model, flexible_bytes=kv_bytes):
                self._loads.start_load(model, self._planned.pop(model), kv_bytes)
            case Drop(model=model):
                self._drop(model)
                return self._residency.unloaded(model, self._clock())
            case AnswerLoad(model=model, error=None, was_loaded=was_loaded):
                self._emit(_model_loaded(model, self.loaded[model], was_loaded=was_loaded))
            case AnswerLoad(model=model, error=error):
                assert error is not None
                self._planned.pop(model, None)
                self._emit(LoadFailed(model=model, error=WireError.of(error)))
            case ReportUnload(model=model, reason=reason):
                self._emit(ModelUnloaded(model=model, reason=reason))
            case _:
                assert_never(action)
        return []

    def _drop(self, model: str) -> None:
        self._planned.pop(model, None)
        loaded = self.loaded.pop(model, None)
        if loaded is not None:
            loaded.close()

    def _take_report(self, report: Report) -> None:
        match report:
            case Planned(model=model, planned=planned):
                self._planned[model] = planned
                self._perform(self._residency.planned(model, planned.demand, self._clock()))
            case Loaded(model=model, loaded=loaded):
                self.loaded[model] = loaded
                self._perform(self._residency.loaded(model, loaded.num_bytes, self._clock()))
            case Failed(model=model, error=error):
                self._perform(self._residency.load_failed(model, error, self._clock()))
            case LoadProgress():
                self._emit(report)
            case _:
                assert_never(report)

    def _model_stats(self, model: str, loaded: LoadedModel, now_s: float) -> ModelStats:
        stats = loaded.engine.stats()
        return ModelStats(
            model=model,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=stats.kv_usage,
            weight_bytes=loaded.weight_bytes,
            kv_cache_bytes=loaded.kv_cache_bytes,
            expires_in_s=self._residency.expires_in_s(model, now_s),
            is_pinned=self._residency.is_pinned(model),
            num_preemptions=stats.num_preemptions,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
        )


def _model_loaded(model: str, loaded: LoadedModel, *, was_loaded: bool) -> ModelLoaded:
    return ModelLoaded(
        model=model,
        weight_bytes=loaded.weight_bytes,
        kv_cache_bytes=loaded.kv_cache_bytes,
        num_kv_blocks=loaded.limits.num_blocks,
        block_size=loaded.limits.block_size,
        max_model_len=loaded.limits.max_model_len,
        dtype=loaded.dtype,
        phase_seconds=loaded.phase_seconds,
        was_loaded=was_loaded,
    )


def _find_conflict(command: LoadModel, wanted: LoadModel) -> str | None:
    """Field that `command` sets and that differs from the load that was wanted before."""
    if command.folder != wanted.folder:
        return "folder"
    for name in ("dtype", "max_model_len"):
        value = getattr(command, name)
        if value is not None and value != getattr(wanted, name):
            return name
    return None
