"""One lock per model, held by at most one thread of one process; the kernel frees it when its holder dies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def hold_lock(path: Path, *, timeout_s: float = -1.0) -> Iterator[bool]:
    """Hold the lock file at `path` for a block; yields whether it was got.

    Args:
        path: Made if absent, and never removed: a lock whose file changes excludes nobody.
        timeout_s: Longest wait; negative: for ever; 0: do not wait.
    """
    lock = FileLock(path, timeout=timeout_s, thread_local=False)
    try:
        lock.acquire(poll_interval=0.05)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
