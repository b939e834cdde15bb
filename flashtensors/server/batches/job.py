"""One batch that has not ended: its record, and what changes it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec

from .disk import run_whole
from .records import BatchRecord, BatchStore


class Job:
    """A batch that has not ended, and the task that follows it."""

    task: asyncio.Task[None]

    def __init__(self, batch_id: str, store: BatchStore) -> None:
        self.should_stop = asyncio.Event()
        """Set when it is cancelled or its time is over."""
        self._batch_id, self._store = batch_id, store
        self._saving = asyncio.Lock()

    @property
    def record(self) -> BatchRecord:
        """The batch as it is now."""
        return self._store.get(self._batch_id)

    async def update(self, **changes: Any) -> BatchRecord:
        """Change the record, durably."""
        self.show(**changes)  # at once, so that two changes on their way to the disk do not undo each other
        async with self._saving:
            await run_whole(self._store.save, self.record)
        return self.record

    async def commit(self, **changes: Any) -> None:
        """Change the record once that is durable: nobody sees, or goes on from, what a crash would undo."""
        async with self._saving:
            await run_whole(self._store.save, msgspec.structs.replace(self.record, **changes))
            self.show(**changes)

    def show(self, **changes: Any) -> None:
        """Change what others see of it."""
        self._store.show(msgspec.structs.replace(self.record, **changes))

    async def finishes(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Run `work` until it ends or the batch is to stop; False when it was stopped. Raises what `work` raises."""
        task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(self.should_stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            return False
        task.result()
        return True
