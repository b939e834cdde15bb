"""Deltas of one generation between the worker's socket and one client, bounded."""

from __future__ import annotations

import asyncio
import time

from ..errors import CapacityError, FlashError
from ..request import SequenceDelta

MAX_UNREAD_DELTAS = 16384
"""Deltas that may wait for a client that does not read; past this its request is dropped."""
BUSY_AFTER_S = 0.002
"""A reader that runs this much later than its mail came is one of many: the event loop is behind."""
MAX_PAUSE_S = 0.05
"""Longest that a reader waits for more mail when the loop is behind."""


class Mailbox:
    """Collects what a worker says about one or several requests until the one reader takes it.

    A reader that is late gets several deltas at once. One that is late because the loop is busy stays away for as long
    again, so that what streams cost does not grow with the number of tokens: each wake-up brings more of them. A reader
    that stopped reading gets a `CapacityError` and its requests are aborted, so that memory stays bounded.
    """

    def __init__(self, limit: int = MAX_UNREAD_DELTAS) -> None:
        self._limit = limit
        self._unread: list[SequenceDelta] = []
        self._error: FlashError | None = None
        self._has_mail = asyncio.Event()
        self._first_put_s = 0.0
        self._pause_s = 0.0

    def put(self, delta: SequenceDelta) -> bool:
        """Add a delta; False when the reader is too far behind and the mailbox has failed."""
        if self._error is None and len(self._unread) >= self._limit:
            self.fail(CapacityError(f"the client left {self._limit} pieces of its answer unread, so it was stopped"))
        if self._error is not None:
            return False
        if not self._unread:
            self._first_put_s = time.monotonic()
        self._unread.append(delta)
        self._has_mail.set()
        return True

    def fail(self, error: FlashError) -> None:
        """Make the reader raise `error` in place of what it has not read yet; the first failure counts."""
        self._error = self._error or error
        self._has_mail.set()

    async def take(self) -> list[SequenceDelta]:
        """Wait for deltas and take all that are there; raises what `fail` was given."""
        due_s = time.monotonic()
        if self._pause_s and self._error is None:
            due_s += self._pause_s
            await asyncio.sleep(self._pause_s)
        if not self._has_mail.is_set():
            await self._has_mail.wait()
            due_s = max(due_s, self._first_put_s)
        if self._error is not None:
            raise self._error
        late_s = time.monotonic() - due_s
        self._has_mail.clear()
        self._pause_s = min(late_s, MAX_PAUSE_S) if late_s > BUSY_AFTER_S else 0.0
        unread, self._unread = self._unread, []
        return unread
