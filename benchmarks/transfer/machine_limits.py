"""What this machine can do at best, measured without any of the package's code."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

MIB = 1024**2


def best_rate(work: Callable[[], object], num_bytes: int, repeats: int = 3) -> float:
    """GB/s of the quickest of some runs, after one that warms up."""
    rates: list[float] = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        rates.append(num_bytes / (time.perf_counter() - started) / 1e9)
    return max(rates[1:])


def pinned_copy_rate(device: torch.device, num_bytes: int = 4 * 1024**3) -> float:
    """GB/s of one copy from page-locked memory to the device."""
    host_B = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    device_B = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def copy() -> None:
        device_B.copy_(host_B, non_blocking=True)
        torch.cuda.synchronize(device)

    return best_rate(copy, num_bytes, 5)


def memcpy_rate(num_threads: int, num_bytes: int = 2 * 1024**3) -> float:
    """GB/s of copying host memory in several threads."""
    source_B = torch.ones(num_bytes, dtype=torch.uint8)
    target_B = torch.ones(num_bytes, dtype=torch.uint8)
    sources = [part.numpy().data for part in source_B.chunk(num_threads)]
    targets = [part.numpy() for part in target_B.chunk(num_threads)]

    def copy_part(index: int) -> None:
        targets[index][:] = sources[index]

    def copy() -> None:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(copy_part, range(num_threads)))

    return best_rate(copy, num_bytes)


def direct_read_rate(paths: list[Path], num_threads: int, block_bytes: int, max_bytes: int) -> float:
    """GB/s of reading files with O_DIRECT, each thread to a buffer of its own."""
    blocks = [(path, at) for path in paths for at in range(0, path.stat().st_size - block_bytes, block_bytes)]
    blocks = blocks[: max_bytes // block_bytes]
    fds = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}
    lock = threading.Lock()
    waiting = iter(blocks)
    buffers = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(num_threads)]
    for buffer in buffers:
        buffer[:] = bytes(block_bytes)

    def read(buffer: memoryview) -> None:
        while True:
            with lock:
                block = next(waiting, None)
            if block is None:
                return
            os.preadv(fds[block[0]], [buffer], block[1])

    started = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, buffers))
    rate = len(blocks) * block_bytes / (time.perf_counter() - started) / 1e9
    for fd in fds.values():
        os.close(fd)
    return rate


def drop_page_cache(paths: list[Path]) -> None:
    """Make the next read of these files come from the disk."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def fill_page_cache(paths: list[Path], num_threads: int = 16) -> None:
    """Make the next read of these files come from memory."""
    blocks = [(path, at) for path in paths for at in range(0, path.stat().st_size, 16 * MIB)]
    buffers = threading.local()

    def read(block: tuple[Path, int]) -> None:
        if not hasattr(buffers, "memory"):
            buffers.memory = memoryview(bytearray(16 * MIB))
        fd = os.open(block[0], os.O_RDONLY)
        os.preadv(fd, [buffers.memory], block[1])
        os.close(fd)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read, blocks))
