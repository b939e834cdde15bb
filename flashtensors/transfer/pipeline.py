"""Moves planned bytes from files into an arena: threads that read, each with its own lane to the memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from ..errors import TransferError
from ..memory.arena import Arena
from .lanes import Lane, Piece, Reader, make_lanes
from .load_plan import FileState, LoadPlan
from .readers.buffered import BufferedReader

CHUNK_SIZE = 32 * 1024**2
"""Bytes of one read, where the caller does not say."""

NUM_THREADS = 4
"""Threads that read, where the caller does not say."""

_PROGRESS_INTERVAL_S = 0.1

OpenReader = Callable[[Mapping[Path, FileState]], AbstractContextManager[Reader]]
"""Opens the files of a plan for reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """What a load took."""

    num_bytes: int
    """Bytes read from files."""
    phase_seconds: dict[str, float]
    """Wall seconds by phase: `prepare` (files opened, staging memory pinned), `read` (until all is in the arena)."""
    reader: str
    """How files were read."""

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read per second of all phases, in units of 10^9."""
        return self.num_bytes / max(sum(self.phase_seconds.values()), 1e-9) / 1e9


def load(
    plan: LoadPlan,
    arena: Arena,
    *,
    num_threads: int = NUM_THREADS,
    chunk_size: int = CHUNK_SIZE,
    progress: Callable[[int, int], None] | None = None,
    cancel: threading.Event | None = None,
    open_reader: OpenReader = BufferedReader,
) -> LoadStats:
    """Fill `arena` with the plan's tensors; returns when every byte is there.

    Args:
        plan: What to load; the files must not have changed since it was made.
        arena: At least `plan.num_bytes` long. Borrowed; undefined after an error.
        num_threads: Threads that read.
        chunk_size: Bytes of one read, at least 4096. On a device, each thread pins twice as much.
        progress: Called on the caller's thread with bytes done and bytes in all, a few times a second and at the end.
        cancel: Set it to make the load raise soon.
        open_reader: How to read files.

    Raises:
        TruncatedFile: A file ends too early.
        CheckpointError: A file is gone, or was replaced since it was planned.
        UnsupportedModel: Values do not fit float16.
        TransferError: A read failed, or the load was cancelled.
    """
    assert arena.num_bytes >= plan.num_bytes, f"{plan.num_bytes} bytes do not fit an arena of {arena.num_bytes}"
    started = time.perf_counter()
    pieces = deque(_pieces(plan, chunk_size))
    with open_reader(plan.files) as reader:
        num_lanes = min(num_threads, len(pieces))
        longest = max((piece.num_bytes for piece in pieces), default=0)
        crew = _Crew(pieces, make_lanes(arena, num_lanes, longest), reader, cancel or threading.Event())
        prepared = time.perf_counter()
        crew.run(progress or _ignore_progress, plan.file_bytes)
    seconds = {"prepare": prepared - started, "read": time.perf_counter() - prepared}
    return LoadStats(num_bytes=plan.file_bytes, phase_seconds=seconds, reader=reader.name)


def _pieces(plan: LoadPlan, chunk_size: int) -> Iterator[Piece]:
    chunk_size -= chunk_size % 16  # whole elements of every dtype
    for extent in plan.extents:
        for start in range(0, extent.num_bytes, chunk_size):
            yield Piece(extent, start, min(chunk_size, extent.num_bytes - start))


def _ignore_progress(done_bytes: int, total_bytes: int) -> None:
    """Stand in for a caller who does not want to know."""


class _Crew:
    """The threads of one load. They take pieces from one queue until it is empty or one of them fails."""

    def __init__(self, pieces: deque[Piece], lanes: list[Lane], reader: Reader, cancel: threading.Event) -> None:
        self._pieces = pieces
        self._lanes = lanes
        self._reader = reader
        self._cancel = cancel
        self._stop = threading.Event()
        self._done_bytes = [0] * len(lanes)

    def run(self, progress: Callable[[int, int], None], total_bytes: int) -> None:
        """Move all pieces; raises the first error once every thread has stopped."""
        with ThreadPoolExecutor(max(len(self._lanes), 1), thread_name_prefix="load") as pool:
            futures = [pool.submit(self._work, index) for index in range(len(self._lanes))]
            try:
                first_failed = self._watch(futures, progress, total_bytes)
            finally:
                self._stop.set()
        if first_failed is not None:
            first_failed.result()
        if self._pieces:
            raise TransferError("the load was cancelled")

    def _watch(
        self, futures: list[Future[None]], progress: Callable[[int, int], None], total_bytes: int
    ) -> Future[None] | None:
        """Report progress until all threads are done or one has failed, which is returned."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _PROGRESS_INTERVAL_S, FIRST_EXCEPTION)
            for future in done:
                if future.exception() is not None:
                    return future
            progress(sum(self._done_bytes), total_bytes)
        return None

    def _work(self, index: int) -> None:
        lane = self._lanes[index]
        try:
            while self._pieces and not (self._stop.is_set() or self._cancel.is_set()):
                try:
                    piece = self._pieces.popleft()
                except IndexError:  # another thread took the last one
                    break
                lane.move(piece, self._reader)
                self._done_bytes[index] += piece.num_bytes
        finally:
            lane.finish()
