"""What a reader is; opening the files of a plan, and the errors of reading them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

from ...closing import Closing
from ...errors import CheckpointError, FileChanged, TransferError, TruncatedFile
from ..file_state import FileState

Preadv = Callable[[int, list[memoryview], int], int]
"""`(fd, buffers, offset) -> num_bytes`, as `os.preadv`; tests put faults here."""


class Reader(Protocol):
    """A way of reading files. `read_into` is called from several threads at once."""

    @property
    def name(self) -> str:
        """What statistics call it."""
        ...

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the file; raises `TruncatedFile` or `TransferError`."""
        ...


OpenReader = Callable[[Mapping[Path, FileState]], AbstractContextManager[Reader]]
"""Opens the files of a plan for reading."""


class OpenFiles(Closing):
    """Descriptors of a plan's files, which are checked to be those that were planned.

    Args:
        files: Each file with the state that it had when it was planned.
        flags: For `open`, beside reading.

    Raises:
        FileChanged: A file is gone, or is not the one that was planned.
        CheckpointError: A file cannot be opened.
    """

    def __init__(self, files: Mapping[Path, FileState], flags: int = 0) -> None:
        self.fds: dict[Path, int] = {}
        with ExitStack() as opened:
            for path, state in files.items():
                fd = _open(path, flags)
                opened.callback(os.close, fd)
                _check_unchanged(path, fd, state)
                self.fds[path] = fd
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._opened.close()


def read_failed(path: Path, offset: int, num_bytes: int, error: OSError) -> TransferError:
    """The error for a read that the system refused."""
    return TransferError(
        f"{path}: reading {num_bytes} bytes at byte {offset} failed: {error.strerror}; "
        "check the disk, then load the model again"
    )


def file_ended(path: Path, offset: int, end: int) -> TruncatedFile:
    """The error for a file that ends at `offset`, before `end`."""
    return TruncatedFile(
        f"{path}: the file ends at byte {offset}, but bytes up to {end} are needed; the file is damaged, pull it again"
    )


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except FileNotFoundError as error:
        raise FileChanged(f"{path}: the file was removed after its header was read; load the model again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; check its permissions") from error


def _check_unchanged(path: Path, fd: int, planned: FileState) -> None:
    found = FileState.of_status(os.fstat(fd))
    if found != planned:
        raise FileChanged(
            f"{path}: the file was replaced after its header was read ({planned.num_bytes} bytes then, "
            f"{found.num_bytes} now); load the model again"
        )
