"""Host memory that is mapped first and taken from the system later, by any number of threads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os

import torch
from torch import Tensor

from ..errors import CapacityError

_TOUCH_BYTES = 4 * 1024**2
"""What is taken from the system at once: meanwhile no thread of the process can start, map or unmap anything."""
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not among mmap's names before Python 3.14


class HostMapping:
    """A range of zeroed anonymous memory, or of a memory file that other processes map too.

    Huge pages are asked for: 1 GiB then takes 0.4 s to touch for the first time, not 1.1 s. The memory goes back when
    the last view of it is gone.

    Args:
        num_bytes: Length of the range.
        fd: A memory file of at least that length; borrowed. None: anonymous memory.

    Raises:
        CapacityError: The system does not map that much.
    """

    def __init__(self, num_bytes: int, fd: int | None = None) -> None:
        self.num_bytes = num_bytes
        self._is_fresh = fd is None
        try:
            if fd is None:
                memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                memory = mmap.mmap(fd, num_bytes)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(f"the system does not map {num_bytes} bytes of host memory: {error}") from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # kernels without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes_B: Tensor = torch.frombuffer(memory, dtype=torch.uint8)
        """The whole range."""
        self.address = self.bytes_B.data_ptr()
        self._libc = ctypes.CDLL(None, use_errno=True)

    def close(self) -> None:
        """Give up the mapping's own hold on the memory, which goes back when the last view of it is gone."""
        self.bytes_B = torch.empty(0, dtype=torch.uint8)

    def touch(self, offset: int, num_bytes: int) -> None:
        """Take memory for a range from the system now; what it holds stays. Other threads run meanwhile.

        Raises:
            CapacityError: The system has no room.
        """
        for start in range(offset, offset + num_bytes, _TOUCH_BYTES):
            self._touch(self.address + start, min(_TOUCH_BYTES, offset + num_bytes - start))

    def _touch(self, address: int, num_bytes: int) -> None:
        pointer, length = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
        while self._libc.madvise(pointer, length, _MADV_POPULATE_WRITE) != 0:
            code = ctypes.get_errno()
            if code in (errno.EINVAL, errno.ENOSYS):  # an older kernel
                if self._is_fresh:
                    ctypes.memset(pointer, 0, num_bytes)
                return
            if code not in (errno.EINTR, errno.EAGAIN):
                raise CapacityError(
                    f"the system has no room for {num_bytes} more bytes of host memory: {os.strerror(code)}; "
                    "lower mem_pool_size"
                )


def create_memory_file(num_bytes: int, name: str = "flashtensors-pool") -> int:
    """A new memory file, which outlives every process that maps it as long as one keeps it open; returns its fd.

    Raises:
        CapacityError: The system makes none of that length.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
    except (OSError, OverflowError) as error:
        raise CapacityError(f"the system makes no memory file of {num_bytes} bytes: {error}") from error
    return fd
