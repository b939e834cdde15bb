"""Reads through the system's page cache: right for files that are in it, and where nothing else is allowed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import CheckpointError, TransferError, TruncatedFile
from ..load_plan import FileState


class BufferedReader:
    """Opens the files of a plan and fills buffers with `preadv`, from any number of threads at once.

    Args:
        files: Each file with the state that it had when it was planned.
        preadv: The system call, `(fd, buffers, offset) -> num_bytes`; tests put faults here.

    Raises:
        CheckpointError: A file cannot be opened, or is not the one that was planned.
    """

    name = "buffered"

    def __init__(
        self, files: Mapping[Path, FileState], *, preadv: Callable[[int, list[memoryview], int], int] = os.preadv
    ) -> None:
        self._preadv = preadv
        self._fds: dict[Path, int] = {}
        with ExitStack() as opened:
            for path, state in files.items():
                fd = _open(path)
                opened.callback(os.close, fd)
                _check_unchanged(path, fd, state)
                self._fds[path] = fd
            self._opened = opened.pop_all()

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the file at `path` from byte `offset`.

        Raises:
            TruncatedFile: The file ends first.
            TransferError: The system reports an error.
        """
        fd = self._fds[path]
        done = 0
        while done < len(buffer):
            try:
                num_bytes = self._preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise TransferError(
                    f"{path}: reading {len(buffer) - done} bytes at byte {offset + done} failed: {error.strerror}; "
                    "check the disk, then load the model again"
                ) from error
            if num_bytes == 0:
                raise TruncatedFile(
                    f"{path}: the file ends at byte {offset + done}, but bytes up to {offset + len(buffer)} "
                    "are needed; the file is damaged, pull it again"
                )
            done += num_bytes

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error


def _check_unchanged(path: Path, fd: int, planned: FileState) -> None:
    status = os.fstat(fd)
    if status.st_size < planned.num_bytes:
        raise TruncatedFile(
            f"{path}: {status.st_size} bytes, but it had {planned.num_bytes} when its header was read; "
            "the file is damaged, pull it again"
        )
    if (status.st_size, status.st_mtime_ns) != (planned.num_bytes, planned.modified_ns):
        raise CheckpointError(f"{path}: the file was replaced after its header was read; load the model again")
