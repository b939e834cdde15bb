"""Answers that are awaited from the worker, by model."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from ..errors import FlashError, WorkerError

_Answer = TypeVar("_Answer")


class PendingAnswers(Generic[_Answer]):
    """One future for each model; callers who ask meanwhile share it, and may leave without ending it for the others."""

    def __init__(self) -> None:
        self._futures: dict[str, asyncio.Future[_Answer]] = {}

    def expect(self, model: str) -> tuple[asyncio.Future[_Answer], bool]:
        """The future of `model`'s answer, and whether it is new: whether the worker is to be asked."""
        future = self._futures.get(model)
        if future is not None:
            return future, False
        future = self._futures[model] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_mark_seen)
        return future, True

    def forget(self, model: str) -> None:
        """The worker could not be asked."""
        self._futures.pop(model).cancel()

    def settle(self, model: str, outcome: _Answer | FlashError) -> None:
        """The answer has come; without anybody who waits it is dropped."""
        future = self._futures.pop(model, None)
        if future is None or future.done():
            return
        if isinstance(outcome, FlashError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def fail_all(self, error: WorkerError) -> None:
        """No answer will come."""
        for model in list(self._futures):
            self.settle(model, error)


def _mark_seen(future: asyncio.Future[_Answer]) -> None:
    """Read a failure even when all who waited have left, so that asyncio does not report it as lost."""
    if not future.cancelled():
        future.exception()
