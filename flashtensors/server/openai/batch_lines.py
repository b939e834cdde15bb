"""Requests that come as lines of a batch: the same answers as over HTTP, behind interactive traffic."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ...config import Settings
from ...errors import UnsupportedField
from ...request import BATCH_PRIORITY
from ..batches.jobs import BatchJobs
from ..batches.records import BatchStore
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

    async def __call__(self, endpoint: str, body: bytes, request_id: str) -> dict[str, object]:
        """The body of the answer; raises `FlashError`."""
        answer = await ENDPOINTS[endpoint](self._models, self._metrics, body, request_id, priority=BATCH_PRIORITY)
        if answer.is_stream:
            raise UnsupportedField("stream is not supported in a batch; leave it out", param="stream")
        return await answer.whole()


def make_batch_jobs(settings: Settings, files: FileStore, models: ModelManager, metrics: Metrics) -> BatchJobs:
    """The batches of a daemon; their window leaves interactive requests a part of the worker's queue."""
    return BatchJobs(
        BatchStore(settings.store / "batches"),
        files,
        BatchLineRunner(models, metrics),
        check_model=models.catalog.get,
        window=max(1, min(2 * settings.max_num_seqs, settings.max_queue * 3 // 4)),
    )
