"""How files are best read, asked of the system once for each file system and remembered."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .readers.direct import DIRECT_ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """What was found out about one file system."""

    kind: str
    """`ext4`, `tmpfs` and so on; `unknown` where the system does not say."""
    accepts_direct: bool
    reason: str
    """Why, for people."""


class FileSystemProbe:
    """Remembers what file systems can do, by device number. Any number of threads may use it."""

    def __init__(self) -> None:
        self._found: dict[int, FileSystem] = {}
        self._lock = threading.Lock()

    def file_system(self, path: Path) -> FileSystem:
        """What the file system of the file at `path` can do.

        Raises:
            CheckpointError: The file is not there, or cannot be read.
        """
        try:
            device = path.stat().st_dev
            with self._lock:
                found = self._found.get(device)
            if found is None:
                found = _try_direct(path, _find_kind(device))
                with self._lock:
                    self._found[device] = found
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return found

    def forget(self) -> None:
        """Ask again: a file system did not do what it was found to do."""
        with self._lock:
            self._found.clear()


@functools.cache
def shared_probe() -> FileSystemProbe:
    """The one of this process: what one load has found out, the next need not ask."""
    return FileSystemProbe()


def refuses_direct(error: BaseException | None) -> bool:
    """Whether the system says by `error` that a file cannot be opened or read with O_DIRECT."""
    return isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.EOPNOTSUPP)


def _try_direct(path: Path, kind: str) -> FileSystem:
    """Read the first bytes of a file with O_DIRECT; raises `OSError` where it cannot be read at all."""
    if not hasattr(os, "O_DIRECT"):
        return FileSystem(kind=kind, accepts_direct=False, reason="this system has no O_DIRECT")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, DIRECT_ALIGNMENT)], 0)
        finally:
            os.close(fd)
    except OSError as error:
        if not refuses_direct(error):
            raise
        return FileSystem(kind=kind, accepts_direct=False, reason=f"{kind} refuses O_DIRECT ({error.strerror})")
    return FileSystem(kind=kind, accepts_direct=True, reason=f"{kind} accepts O_DIRECT")


def _find_kind(device: int) -> str:
    """Type of the file system with that device number, from the mount table."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0]
    return "unknown"
