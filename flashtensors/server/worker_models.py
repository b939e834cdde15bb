"""What a worker says of its models: which are on the device, how far loads are, and the answers to those who asked."""

from __future__ import annotations

import time

from ..errors import WorkerError
from ..worker.messages import (
    Event,
    LoadFailed,
    LoadProgress,
    ModelLanded,
    ModelLoaded,
    ModelLoadFailed,
    ModelReady,
    ModelUnloaded,
    Prefetched,
)
from ..worker.stats import Stats
from .metrics import Metrics
from .pending import PendingAnswers


class WorkerModels:
    """The models of one worker after another.

    Args:
        metrics: Where loads, unloads and reports are counted.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.loaded: dict[str, ModelReady] = {}
        """Models on the device, by name; the last layers of some may still be on their way."""
        self.progress: dict[str, LoadProgress] = {}
        """How far the loads that run have come, by name."""
        self.stats: Stats | None = None
        """The worker's latest report; an idle worker reports changes only."""
        self.stats_unix_s = 0.0
        """When that report came."""
        self.loads: PendingAnswers[ModelLoaded] = PendingAnswers()
        self.prefetches: PendingAnswers[Prefetched] = PendingAnswers()
        self.unloads: PendingAnswers[None] = PendingAnswers()
        self._metrics = metrics
        self._has_evicted = False

    def route(self, event: Event) -> None:
        """Take in an event; those that are about requests, not models, are ignored."""
        match event:
            case LoadProgress(model=model):
                self.progress[model] = event
            case ModelReady(model=model):
                self.loaded[model] = event
                if self._has_evicted:
                    self._metrics.swaps.inc()
                    self._has_evicted = False
            case ModelLanded(model=model):
                self.progress.pop(model, None)
                self._metrics.observe_load(event)
            case ModelLoadFailed(model=model, error=error):
                self.progress.pop(model, None)
                self._metrics.load_failures.labels(model, error.code).inc()
            case ModelUnloaded():
                self._take_unloaded(event)
            case Stats():
                self.stats, self.stats_unix_s = event, time.time()
                self._metrics.observe_stats(event)
            case _:
                self._route_answer(event)

    def lose_all(self, error: WorkerError) -> None:
        """The worker is gone: nobody gets an answer from it, and nothing is loaded."""
        for pending in (self.loads, self.prefetches, self.unloads):
            pending.fail_all(error)
        self.loaded, self.progress, self.stats, self._has_evicted = {}, {}, None, False
        self._metrics.forget_all()

    def _route_answer(self, event: Event) -> None:
        match event:
            case ModelLoaded(model=model):
                self.loads.settle(model, event)
            case LoadFailed(model=model, error=wire):
                self.loads.settle(model, wire.unpack())
            case Prefetched(model=model, error=wire):
                self.progress.pop(model, None)
                self.prefetches.settle(model, event if wire is None else wire.unpack())
            case _:
                pass

    def _take_unloaded(self, event: ModelUnloaded) -> None:
        model, reason = event.model, event.reason
        self._has_evicted = self._has_evicted or reason == "evicted"
        self.progress.pop(model, None)
        if self.loaded.pop(model, None) is not None:
            self._metrics.unloads.labels(model, reason).inc()
            self._metrics.forget(model)
        self.unloads.settle(model, None)
