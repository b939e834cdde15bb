"""How far a pull or a check is, for people who wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import msgspec

PullStatus = Literal["resolving", "downloading", "converting", "verifying", "done"]


class PullProgress(msgspec.Struct, frozen=True, kw_only=True):
    """One report: bytes of `file`, or of all files where `file` is None."""

    status: PullStatus
    file: str | None = None
    done_bytes: int = 0
    total_bytes: int | None = None
    """None while the source has not said."""


ReportProgress = Callable[[PullProgress], None]
"""Called from the thread that works, one call at a time; what it raises ends the work."""


class Reporter:
    """Counts the bytes of one status at a time, from any number of threads, and reports each whole percent."""

    def __init__(self, report: ReportProgress | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._state = PullProgress(status="resolving")
        self._last_percent = -1

    def begin(self, status: PullStatus, *, file: str | None = None, total_bytes: int | None = None) -> None:
        """Enter a status with no bytes done."""
        with self._lock:
            self._last_percent = -1
            self._send(PullProgress(status=status, file=file, total_bytes=total_bytes))

    def advance(self, num_bytes: int) -> None:
        """Count bytes of the present status."""
        with self._lock:
            self._move(self._state.done_bytes + num_bytes, self._state.total_bytes)

    def move_to(self, done_bytes: int, total_bytes: int | None) -> None:
        """Set how far the present status is; it never goes back."""
        with self._lock:
            self._move(max(done_bytes, self._state.done_bytes), total_bytes)

    def _move(self, done_bytes: int, total_bytes: int | None) -> None:
        state = msgspec.structs.replace(self._state, done_bytes=done_bytes, total_bytes=total_bytes)
        percent = done_bytes * 100 // total_bytes if total_bytes else done_bytes >> 20
        if percent == self._last_percent:
            self._state = state
            return
        self._last_percent = percent
        self._send(state)

    def _send(self, state: PullProgress) -> None:
        self._state = state
        if self._report is not None:
            self._report(state)
