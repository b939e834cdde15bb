"""Progress of something that is done in parts, told as one."""

from __future__ import annotations

import time

from .crew import PROGRESS_INTERVAL_S, Progress


class ProgressSum:
    """Adds up parts for a progress function.

    Args:
        progress: None: nobody wants to know.
        total_bytes: Bytes in all.
    """

    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._progress = progress
        self._done_bytes = 0
        self._reported_s = time.monotonic()

    def report(self, done_bytes: int, total_bytes: int) -> None:
        """Of the part that is under way, `done_bytes` are done."""
        if self._progress is not None:
            self._progress(self._done_bytes + done_bytes, self.total_bytes)

    def add(self, num_bytes: int) -> None:
        """A part is done."""
        self._done_bytes += num_bytes

    def tick(self, num_bytes: int) -> None:
        """Some bytes are done; tells so, unless that was done a moment ago."""
        self._done_bytes += num_bytes
        now_s = time.monotonic()
        if self._progress is not None and now_s - self._reported_s >= PROGRESS_INTERVAL_S:
            self._reported_s = now_s
            self._progress(self._done_bytes, self.total_bytes)

    def finish(self) -> None:
        """All is done."""
        if self._progress is not None:
            self._progress(self.total_bytes, self.total_bytes)
