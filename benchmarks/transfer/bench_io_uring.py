"""Does io_uring read files more quickly than threads do, past the page cache?

A file is written to `--folder` and read whole with O_DIRECT, a block at a time, with as many blocks on their way as
there are threads, or entries in a ring of one thread; both without any of the package's code. They take turns, three
times each; a row holds what each reached and the ratio. Where the kernel or the container forbids io_uring, that is the
error.

    python benchmarks/transfer/bench_io_uring.py [--folder /somewhere] [--gigabytes 4]
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from machine_limits import MIB, direct_read_rate, drop_page_cache
from record import report, spread

DEPTHS = (4, 8, 16, 32)
BLOCKS_MIB = (1, 4, 16)
NUM_TURNS = 3

_SETUP, _ENTER = 425, 426
"""System calls, of every architecture."""
_READ, _GET_EVENTS = 22, 1
_PARAMS_BYTES, _ENTRY_BYTES = 120, 64


def write_file(path: Path, num_bytes: int) -> None:
    """Random bytes, on the disk and not in the page cache."""
    block = os.urandom(16 * MIB)
    with open(path, "wb", buffering=0) as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
    drop_page_cache([path])


class Ring:
    """A submission and a completion queue shared with the kernel, by the system calls themselves.

    Raises:
        OSError: The kernel, or the container, refuses io_uring.
    """

    def __init__(self, depth: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        params = bytearray(_PARAMS_BYTES)
        self.fd = self._call(_SETUP, depth, (ctypes.c_char * _PARAMS_BYTES).from_buffer(params))
        num_entries, num_completions = struct.unpack_from("II", params, 0)
        submissions, completions = struct.unpack_from("10I", params, 40), struct.unpack_from("10I", params, 80)
        map_ = lambda num_bytes, at: mmap.mmap(self.fd, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=at)  # noqa: E731
        self._submissions = map_(submissions[6] + 4 * num_entries, 0)
        self._completions = map_(completions[5] + 16 * num_completions, 0x8000000)
        self._entries = map_(_ENTRY_BYTES * num_entries, 0x10000000)
        self._tail_at, self._mask, self._array_at = submissions[1], num_entries - 1, submissions[6]
        self._done_head_at, self._done_tail_at, self._done_at = completions[0], completions[1], completions[5]
        self._done_mask = num_completions - 1

    def read(self, fd: int, address: int, num_bytes: int, offset: int, user_data: int) -> None:
        """Add a read to those that the next `enter` hands over."""
        (tail,) = struct.unpack_from("I", self._submissions, self._tail_at)
        place = tail & self._mask
        entry = struct.pack("BBHiQQIIQ", _READ, 0, 0, fd, offset, address, num_bytes, 0, user_data)
        self._entries[place * _ENTRY_BYTES : (place + 1) * _ENTRY_BYTES] = entry.ljust(_ENTRY_BYTES, b"\0")
        struct.pack_into("I", self._submissions, self._array_at + 4 * place, place)
        struct.pack_into("I", self._submissions, self._tail_at, tail + 1)

    def enter(self, num_new: int) -> list[tuple[int, int]]:
        """Hand reads over, wait for one, and return (user data, bytes read) of all that have ended."""
        self._call(_ENTER, self.fd, num_new, 1, _GET_EVENTS, None, 0)
        (head,) = struct.unpack_from("I", self._completions, self._done_head_at)
        (tail,) = struct.unpack_from("I", self._completions, self._done_tail_at)
        places = [self._done_at + 16 * (i & self._done_mask) for i in range(head, tail)]
        ended = [struct.unpack_from("Qi", self._completions, place) for place in places]
        struct.pack_into("I", self._completions, self._done_head_at, tail)
        return ended

    def close(self) -> None:
        """Give the ring up; nothing is under way."""
        for each in (self._submissions, self._completions, self._entries):
            each.close()
        os.close(self.fd)

    def _call(self, number: int, *arguments: object) -> int:
        answer = self._libc.syscall(number, *arguments)
        if answer < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return answer


def ring_read_rate(path: Path, depth: int, block_bytes: int) -> float:
    """GB/s of reading a file by one thread through a ring with so many reads under way."""
    offsets = list(range(0, path.stat().st_size - block_bytes, block_bytes))
    buffers = [mmap.mmap(-1, block_bytes) for _ in range(depth)]
    for buffer in buffers:
        buffer[:] = bytes(block_bytes)
    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(buffer)) for buffer in buffers]
    fd, ring, waiting, num_flying = os.open(path, os.O_RDONLY | os.O_DIRECT), Ring(depth), iter(offsets), 0
    free, started = list(range(depth)), time.perf_counter()
    while True:
        new = [(place, offset) for place, offset in zip(free, waiting, strict=False)]
        for place, offset in new:
            ring.read(fd, addresses[place], block_bytes, offset, place)
        num_flying += len(new)
        if not num_flying:
            break
        ended = ring.enter(len(new))
        assert all(num_read == block_bytes for _, num_read in ended), ended
        free = [place for place, _ in ended]
        num_flying -= len(ended)
    rate = len(offsets) * block_bytes / (time.perf_counter() - started) / 1e9
    ring.close()
    os.close(fd)
    return rate


def measure(path: Path, depth: int, block_bytes: int) -> dict[str, Any]:
    """One row."""
    threads, ring = [], []
    for _ in range(NUM_TURNS):
        threads.append(direct_read_rate([path], depth, block_bytes, path.stat().st_size))
        ring.append(ring_read_rate(path, depth, block_bytes))
    row = {"depth": depth, "block_mib": block_bytes // MIB, "threads_gb_per_s": spread(threads)}
    row["io_uring_gb_per_s"] = spread(ring)
    return row | {"times_threads": round(row["io_uring_gb_per_s"]["median"] / row["threads_gb_per_s"]["median"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be read")
    parser.add_argument("--gigabytes", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    with tempfile.NamedTemporaryFile(dir=arguments.folder) as file:
        path = Path(file.name)
        write_file(path, arguments.gigabytes << 30)
        for block_mib in BLOCKS_MIB:
            for depth in DEPTHS:
                rows.append(measure(path, depth, block_mib * MIB))
                print(rows[-1], flush=True)
    report("io-uring", rows, gigabytes=arguments.gigabytes)


if __name__ == "__main__":
    main()
