"""Reads through the system's page cache: right for files that are in it, and where nothing else is allowed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ...closing import Closing
from ..file_state import FileState
from .files import OpenFiles, Preadv, file_ended, read_failed


class BufferedReader(Closing):
    """Opens the files of a plan and fills buffers with `preadv`, from any number of threads at once.

    Args:
        files: Each file with the state that it had when it was planned.
        preadv: The system call.

    Raises:
        FileChanged, CheckpointError: As `OpenFiles`.
    """

    name = "buffered"

    def __init__(self, files: Mapping[Path, FileState], *, preadv: Preadv = os.preadv) -> None:
        self._preadv = preadv
        self._files = OpenFiles(files)

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the file at `path` from byte `offset`.

        Raises:
            TruncatedFile: The file ends first.
            TransferError: The system reports an error.
        """
        fd = self._files.fds[path]
        done = 0
        while done < len(buffer):
            try:
                num_bytes = self._preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise read_failed(path, offset + done, len(buffer) - done, error) from error
            if num_bytes == 0:
                raise file_ended(path, offset + done, offset + len(buffer))
            done += num_bytes

    def fd(self, path: Path) -> int:
        """The descriptor of a file; stays the reader's."""
        return self._files.fds[path]

    def close(self) -> None:
        """Close the files."""
        self._files.close()
