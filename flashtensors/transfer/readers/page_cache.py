"""Asks the kernel how much of a file is in its page cache."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from pathlib import Path

_CACHESTAT = 451  # Linux 6.5; one number on every architecture


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("num_bytes", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


class PageCache:
    """Answers from the kernel's own books: `cachestat` where it is, else `mincore`.

    Newer kernels tell only who owns a file or may write to it: to others `cachestat` is refused, and `mincore` says
    that every page is there.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._has_cachestat = platform.system() == "Linux"

    def find_share(self, fd: int, offset: int, num_bytes: int) -> float | None:
        """Share of `num_bytes` of a file from byte `offset`, a multiple of the page size, that is in the cache.

        None where the kernel does not say. A range without bytes is in the cache.
        """
        if num_bytes == 0:
            return 1.0
        cached = self._ask_cachestat(fd, offset, num_bytes) if self._has_cachestat else None
        if cached is None:
            cached = self._ask_mincore(fd, offset, num_bytes)
        return None if cached is None else min(1.0, cached / _num_pages(num_bytes))

    def find_file_share(self, path: Path) -> float | None:
        """Share of a whole file that is in the cache; None where the kernel does not say."""
        with open(path, "rb") as file:
            return self.find_share(file.fileno(), 0, path.stat().st_size)

    def _ask_cachestat(self, fd: int, offset: int, num_bytes: int) -> int | None:
        asked, answer = _Range(offset, num_bytes), _CacheStat()
        pointers = ctypes.byref(asked), ctypes.byref(answer)
        if self._libc.syscall(_CACHESTAT, ctypes.c_uint(fd), *pointers, ctypes.c_uint(0)) == 0:
            return answer.cached
        self._has_cachestat = ctypes.get_errno() != errno.ENOSYS  # an older kernel; others may refuse one file alone
        return None

    def _ask_mincore(self, fd: int, offset: int, num_bytes: int) -> int | None:
        if not hasattr(self._libc, "mincore") or not _is_told(fd):
            return None
        try:
            # Private and writable only so that ctypes can take its address; nothing is read or written.
            mapping = mmap.mmap(fd, num_bytes, access=mmap.ACCESS_COPY, offset=offset)
        except (OSError, ValueError):
            return None
        is_cached = (ctypes.c_ubyte * _num_pages(num_bytes))()
        anchor = ctypes.c_char.from_buffer(mapping)
        try:
            result = self._libc.mincore(
                ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(num_bytes), is_cached
            )
        finally:
            del anchor
            mapping.close()
        return sum(byte & 1 for byte in is_cached) if result == 0 else None


def _is_told(fd: int) -> bool:
    """Whether `mincore` tells this process the truth about a file."""
    if os.fstat(fd).st_uid == os.geteuid():
        return True
    return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _num_pages(num_bytes: int) -> int:
    return -(-num_bytes // os.sysconf("SC_PAGE_SIZE"))
