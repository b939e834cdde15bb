"""What CUDA's virtual memory management does, in host memory: for arenas on a CPU, and to test what uses them.

Physical memory is a memory file; mapping it at a fixed address is what `mmap` was made for.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import torch
from torch import Tensor

from ..errors import CapacityError, FlashError, TransferError
from .host_mapping import create_memory_file

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MAP_FAILED = ctypes.c_void_p(-1).value


class HostMemoryDriver:
    """Physical memory and addresses of the host, on Linux. A handle is the descriptor of a memory file."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.granularity_bytes = mmap.PAGESIZE
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p

    def create(self, num_bytes: int) -> int:
        """Physical memory, a multiple of `granularity_bytes`, taken from the system when it is first written."""
        return create_memory_file(num_bytes, "flashtensors-arena")

    def release(self, handle: int) -> None:
        """Give physical memory back once it is mapped nowhere."""
        os.close(handle)

    def reserve(self, num_bytes: int) -> int:
        """An address range with no memory behind it; touching it ends the process."""
        return self._map(0, num_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)

    def free(self, address: int, num_bytes: int) -> None:
        """Give an address range back; nothing is mapped there."""
        if self._libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)) != 0:
            raise TransferError(f"munmap of {num_bytes} bytes failed: {os.strerror(ctypes.get_errno())}")

    def map(self, address: int, handles: list[int], handle_bytes: int) -> None:
        """Put handles behind the range that begins at `address`, one after another, for reading and writing."""
        flags = mmap.MAP_SHARED | _MAP_FIXED
        for index, handle in enumerate(handles):
            try:
                self._map(address + index * handle_bytes, handle_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, handle)
            except FlashError:
                self.unmap(address, index, handle_bytes)
                raise

    def unmap(self, address: int, num_handles: int, handle_bytes: int) -> None:
        """Take the memory away from behind a range; nobody uses it any more."""
        if num_handles == 0:
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._map(address, num_handles * handle_bytes, _PROT_NONE, flags, -1)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """Mapped addresses as bytes; nothing is copied, and the tensor owns nothing."""
        return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)

    def _map(self, address: int, num_bytes: int, protection: int, flags: int, fd: int) -> int:
        found = self._libc.mmap(
            ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), protection, flags, fd, ctypes.c_long(0)
        )
        if found == _MAP_FAILED or found is None:
            raise CapacityError(f"mmap of {num_bytes} bytes failed: {os.strerror(ctypes.get_errno())}")
        return int(found)
