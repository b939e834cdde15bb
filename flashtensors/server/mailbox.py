"""Deltas of one generation between the worker's socket and one client, bounded."""

from __future__ import annotations

import asyncio

from ..errors import CapacityError, FlashError
from ..request import SequenceDelta

MAX_UNREAD_DELTAS = 16384
"""Deltas that may wait for a client that does not read; past this its request is dropped."""


class Mailbox:
    """Collects what a worker says about one or several requests until the one reader takes it.

    A reader that is late gets several deltas at once; a reader that stopped reading gets a `CapacityError` and its
    requests are aborted, so that memory stays bounded.
    """

    def __init__(self, limit: int = MAX_UNREAD_DELTAS) -> None:
        self._limit = limit
        self._unread: list[SequenceDelta] = []
        self._error: FlashError | None = None
        self._has_mail = asyncio.Event()

    def put(self, delta: SequenceDelta) -> bool:
        """Add a delta; False when the reader is too far behind and the mailbox has failed."""
        if self._error is None and len(self._unread) >= self._limit:
            self.fail(CapacityError(f"the client left {self._limit} pieces of its answer unread, so it was stopped"))
        if self._error is not None:
            return False
        self._unread.append(delta)
        self._has_mail.set()
        return True

    def fail(self, error: FlashError) -> None:
        """Make the reader raise `error` in place of what it has not read yet; the first failure counts."""
        self._error = self._error or error
        self._has_mail.set()

    async def take(self) -> list[SequenceDelta]:
        """Wait for deltas and take all that are there; raises what `fail` was given."""
        await self._has_mail.wait()
        if self._error is not None:
            raise self._error
        self._has_mail.clear()
        unread, self._unread = self._unread, []
        return unread
