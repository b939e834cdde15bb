"""What this machine can do at best, to hold loads against: copies to the device, reads from page cache and disk."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

BLOCK_BYTES = 4 * 1024**2
MAX_BYTES = 2 * 1024**3
"""Most bytes that one measurement moves."""
_ALIGNMENT = 4096


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of copying page-locked memory to a CUDA device, or memory to memory on a CPU."""
    num_bytes = max(BLOCK_BYTES, min(num_bytes, MAX_BYTES))
    is_cuda = device.type == "cuda"
    source_B = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    target_B = torch.ones(num_bytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        target_B.copy_(source_B, non_blocking=True)
        if is_cuda:
            torch.cuda.synchronize(device)

    return _best_rate(copy, num_bytes)


def cached_read_rate(paths: Sequence[Path], num_threads: int) -> float:
    """Bytes a second of reading files that are in the page cache, which this reads into it first."""
    num_bytes = sum(length for _, _, length in _blocks(paths, 1))
    return _best_rate(lambda: _read(paths, num_threads, os.O_RDONLY), num_bytes)


def disk_read_rate(paths: Sequence[Path], num_threads: int) -> float | None:
    """Bytes a second of reading files past the page cache; None where the file system refuses that."""
    num_bytes = sum(length for _, _, length in _blocks(paths, _ALIGNMENT))
    if num_bytes == 0 or not hasattr(os, "O_DIRECT"):
        return None
    try:
        started_s = time.perf_counter()
        _read(paths, num_threads, os.O_RDONLY | os.O_DIRECT)
        return num_bytes / (time.perf_counter() - started_s)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return None


def drop_page_cache(paths: Sequence[Path]) -> None:
    """Make the next read of these files come from the disk, as far as the kernel obliges."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _best_rate(work: Callable[[], object], num_bytes: int) -> float:
    rates: list[float] = []
    for _ in range(4):
        started_s = time.perf_counter()
        work()
        rates.append(num_bytes / (time.perf_counter() - started_s))
    return max(rates[1:])


def _blocks(paths: Sequence[Path], alignment: int) -> list[tuple[Path, int, int]]:
    """`(path, offset, length)` of the first `MAX_BYTES` of files, in pieces; tails are left out where not aligned."""
    pieces: list[tuple[Path, int, int]] = []
    for path in paths:
        size = path.stat().st_size // alignment * alignment
        pieces += [(path, at, min(BLOCK_BYTES, size - at)) for at in range(0, size, BLOCK_BYTES)]
    return pieces[: MAX_BYTES // BLOCK_BYTES]


def _read(paths: Sequence[Path], num_threads: int, flags: int) -> None:
    is_direct = flags != os.O_RDONLY
    blocks = iter(_blocks(paths, _ALIGNMENT if is_direct else 1))
    lock = threading.Lock()
    fds = {path: os.open(path, flags | os.O_CLOEXEC) for path in paths}

    def work(_: int) -> None:
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        while True:
            with lock:
                block = next(blocks, None)
            if block is None:
                return
            path, at, length = block
            os.preadv(fds[path], [buffer[:length]], at)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(work, range(num_threads)))
    finally:
        for fd in fds.values():
            os.close(fd)
