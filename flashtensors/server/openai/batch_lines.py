"""Requests that come as lines of a batch: the same answers as over HTTP, behind interactive traffic."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from ...config import Settings
from ...errors import CapacityError, UnsupportedField
from ...request import BATCH_PRIORITY
from ..batches.jobs import BatchJobs
from ..batches.records import BatchStore
from ..batches.window import QueueReport, Window, WindowLimits
from ..files import FileStore
from ..metrics import Metrics
from ..models import ModelManager
from .chat import ChatAnswer, open_chat
from .completions import CompletionAnswer, open_completion

Opener = Callable[..., Awaitable[ChatAnswer | CompletionAnswer]]

ENDPOINTS: dict[str, Opener] = {"/v1/chat/completions": open_chat, "/v1/completions": open_completion}
"""Routes that a batch may ask for."""


class BatchLineRunner:
    """Answers lines of batches with a daemon's models.

    Args:
        models: Brings them onto the device.
        metrics: Where tokens are counted.
    """

    def __init__(self, models: ModelManager, metrics: Metrics) -> None:
        self._models, self._metrics = models, metrics
        self._names: dict[str, str] = {}

    def check_model(self, model: str) -> None:
        """Raise `FlashError` for a model that the store does not have; blocks."""
        self._names[model] = self._models.catalog.get(model).name

    async def __call__(self, endpoint: str, body: bytes, request_id: str) -> dict[str, object] | None:
        """The body of the answer; None while the model's queue is full or no worker is ready. Raises `FlashError`."""
        answer = await ENDPOINTS[endpoint](self._models, self._metrics, body, request_id, priority=BATCH_PRIORITY)
        if answer.is_stream:
            raise UnsupportedField("stream is not supported in a batch; leave it out", param="stream")
        supervisor = self._models.supervisor
        if supervisor.state != "ready":  # a worker that dies as it starts says nothing of the request
            return None
        try:
            return await answer.whole()
        except CapacityError:
            model = await self._models.open(msgspec.json.decode(body)["model"])
            if model.name not in supervisor.models.loaded:
                await self._models.ensure_loaded(model)  # says why, where it is the device that lacks room
            return None

    def find_report(self, model: str) -> QueueReport | None:
        """The worker's latest report on a model that was checked; None: it is not on the device."""
        known = self._models.supervisor.models
        name, models = self._names.get(model), known.stats.models if known.stats is not None else ()
        waiting = [each.num_waiting for each in models if each.model == name]
        return QueueReport(at_s=known.stats_unix_s, num_waiting=waiting[0]) if waiting else None


def window_limits(settings: Settings) -> WindowLimits:
    """Limits of a window that leaves interactive requests a quarter of the worker's queue."""
    num_slots, max_queue = settings.max_num_seqs, settings.max_queue
    num_sure = max(1, min(2 * num_slots, max_queue * 3 // 4))
    num_spare = max(1, min(num_slots, max_queue // 4))
    return WindowLimits(num_sure=num_sure, num_most=max(num_sure, num_slots + num_spare), num_spare=num_spare)


def make_batch_jobs(settings: Settings, files: FileStore, models: ModelManager, metrics: Metrics) -> BatchJobs:
    """The batches of a daemon."""
    runner, limits = BatchLineRunner(models, metrics), window_limits(settings)
    return BatchJobs(
        BatchStore(settings.store / "batches"),
        files,
        runner,
        check_model=runner.check_model,
        make_window=lambda: Window(limits, runner.find_report),
    )
