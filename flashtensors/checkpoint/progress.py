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
    """Counts the bytes of one status at a time, from any number of threads."""

    def __init__(self, report: ReportProgress | None) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._state = PullProgress(status="resolving")

    def begin(self, status: PullStatus, *, file: str | None = None, total_bytes: int | None = None) -> None:
        """Enter a status with no bytes done."""
        with self._lock:
            self._send(PullProgress(status=status, file=file, total_bytes=total_bytes))

    def advance(self, num_bytes: int) -> None:
        """Count bytes of the present status; reports once in a percent."""
        with self._lock:
            state = self._state
            done_bytes, before = state.done_bytes + num_bytes, state.done_bytes
            state = msgspec.structs.replace(state, done_bytes=done_bytes)
            if _step(done_bytes, state.total_bytes) == _step(before, state.total_bytes):
                self._state = state
            else:
                self._send(state)

    def move_to(self, done_bytes: int, total_bytes: int | None) -> None:
        """Set how far the present status is, which never goes back, and report it, changed or not."""
        with self._lock:
            done_bytes = max(done_bytes, self._state.done_bytes)
            self._send(msgspec.structs.replace(self._state, done_bytes=done_bytes, total_bytes=total_bytes))

    def _send(self, state: PullProgress) -> None:
        self._state = state
        if self._report is not None:
            self._report(state)


def _step(done_bytes: int, total_bytes: int | None) -> int:
    return done_bytes * 100 // total_bytes if total_bytes else done_bytes >> 20
