"""Pages that are used again and again: each is read to once the copy of what it held before has ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

import torch

from ..memory.host_pool import Page


class StagingRing:
    """Pages in the order in which they come free. Any number of threads may use it.

    Args:
        pages: Borrowed until all copies from them have ended.
    """

    def __init__(self, pages: Iterable[Page]) -> None:
        self._free: deque[tuple[Page, torch.cuda.Event | None]] = deque((page, None) for page in pages)
        self._changed = threading.Condition()
        self._is_stopped = False

    def take(self) -> Page | None:
        """The page that was put back first, waiting for it and for its copy; None once `stop` was called."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free) or self._is_stopped)
            if self._is_stopped:
                return None
            page, copied = self._free.popleft()
        if copied is not None:
            copied.synchronize()
        return page

    def put(self, page: Page, copied: torch.cuda.Event | None) -> None:
        """Let others use a page once `copied` is over (None: at once)."""
        with self._changed:
            self._free.append((page, copied))
            self._changed.notify()

    def stop(self) -> None:
        """Send away all who wait."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
