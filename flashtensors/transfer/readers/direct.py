"""Reads past the system's page cache, from the disk into the page that the device copies from.

Linux wants O_DIRECT reads aligned, in the file and in memory; 4096 bytes satisfy every disk. What is not aligned (the
end of a file, the rest after a short read) is read through the page cache.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from ...closing import Closing
from ..file_state import FileState
from .buffered import BufferedReader
from .files import OpenFiles, Preadv, read_failed

DIRECT_ALIGNMENT = 4096
"""What offsets, lengths and addresses are multiples of."""
READ_BYTES = 4 * 1024**2
"""Longest single read; the kernel cuts longer ones itself, and waits for their last part."""


class DirectReader(Closing):
    """Opens the files of a plan with O_DIRECT and fills buffers, from any number of threads at once.

    Args:
        files: Each file with the state that it had when it was planned.
        preadv: The system call.
        read_bytes: Longest single read.

    Raises:
        FileChanged, CheckpointError: As `OpenFiles`; the latter also where the file system refuses O_DIRECT.
    """

    name = "direct"

    def __init__(
        self, files: Mapping[Path, FileState], *, preadv: Preadv = os.preadv, read_bytes: int = READ_BYTES
    ) -> None:
        self._preadv = preadv
        self._read_bytes = read_bytes
        self._buffered = BufferedReader(files, preadv=preadv)
        try:
            self._files = OpenFiles(files, os.O_DIRECT)
        except BaseException:
            self._buffered.close()
            raise

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the file at `path` from byte `offset`; any alignment is right, none quicker.

        Raises:
            TruncatedFile: The file ends first.
            TransferError: The system reports an error.
        """
        done = self._read_aligned(path, offset, buffer) if offset % DIRECT_ALIGNMENT == 0 else 0
        if done < len(buffer):
            self._buffered.read_into(path, offset + done, buffer[done:])

    def close(self) -> None:
        """Close the files."""
        self._files.close()
        self._buffered.close()

    def _read_aligned(self, path: Path, offset: int, buffer: memoryview) -> int:
        """Bytes from the beginning of `buffer` that were read; ends at the first one that cannot be read directly."""
        fd = self._files.fds[path]
        end = len(buffer) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        done = 0
        while done < end and done % DIRECT_ALIGNMENT == 0:
            piece = buffer[done : min(done + self._read_bytes, end)]
            try:
                num_bytes = self._preadv(fd, [piece], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL:  # a buffer or disk of another alignment
                    break
                raise read_failed(path, offset + done, len(piece), error) from error
            if num_bytes == 0:
                break
            done += num_bytes
        return done
