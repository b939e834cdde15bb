"""Makes the segments of a host pool ready, several threads at once: touch, then register."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import FlashError, TransferError
from .host_mapping import HostMapping
from .pinning import Pinning

SEGMENT_BYTES = 256 * 1024**2
"""Length of a segment: drivers hold locks while they register, and some kernels refuse more than 2 GiB at once."""
MIN_SEGMENT_BYTES = 32 * 1024**2
"""Shortest half of a segment that the system refused which is tried alone."""
SLICE_BYTES = 16 * 1024**2
"""What one thread touches at a time."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of whole pages that is registered at once."""

    offset: int
    num_bytes: int


def cut_segments(num_bytes: int, page_bytes: int, segment_bytes: int) -> list[Segment]:
    """Consecutive segments of whole pages over `num_bytes`, a multiple of `page_bytes`, none longer than asked for.

    A segment has at least one page, however long a page is.
    """
    length = max(1, segment_bytes // page_bytes) * page_bytes
    return [Segment(offset, min(length, num_bytes - offset)) for offset in range(0, num_bytes, length)]


class SegmentBuilder:
    """The threads that make segments ready, in order.

    Args:
        mapping: The memory.
        segments: Its parts.
        page_bytes: What a part that is registered alone is a multiple of.
        pinning: Registers them; None: they are only touched.
        wait_turn: Called before each slice; returns when it may be touched.
        on_ready: Told about each part that can be used, and whether it is registered; from any of the threads.
        on_error: Told about the error that ended the work.
    """

    def __init__(
        self,
        mapping: HostMapping,
        segments: Sequence[Segment],
        page_bytes: int,
        pinning: Pinning | None,
        wait_turn: Callable[[], None],
        on_ready: Callable[[Segment, bool], None],
        on_error: Callable[[FlashError], None],
    ) -> None:
        self._mapping = mapping
        self._page_bytes = page_bytes
        self._pinning = pinning
        self._wait_turn = wait_turn
        self._on_ready = on_ready
        self._on_error = on_error
        self._lock = threading.Lock()
        self._slices = deque(
            (segment, offset, min(SLICE_BYTES, segment.offset + segment.num_bytes - offset))
            for segment in segments
            for offset in range(segment.offset, segment.offset + segment.num_bytes, SLICE_BYTES)
        )
        self._untouched_bytes = {segment: segment.num_bytes for segment in segments}
        self._registered: list[int] = []
        self._threads: list[threading.Thread] = []
        self.error: FlashError | None = None
        """What ended the work early."""
        self.pinning_problem: str | None = None
        """What the system said when it last refused to register a part; smaller parts may have been accepted."""

    def start(self, num_threads: int) -> None:
        """Begin, in the background."""
        self._threads = [
            threading.Thread(target=self._work, name=f"host-pool-{index}", daemon=True)
            for index in range(min(num_threads, len(self._slices)))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop soon, wait for the threads and undo the registrations."""
        with self._lock:
            self._slices.clear()
        for thread in self._threads:
            thread.join()
        while self._registered and self._pinning is not None:
            self._pinning.unregister(self._registered.pop())

    def _work(self) -> None:
        try:
            while (piece := self._next_slice()) is not None:
                self._wait_turn()
                segment, offset, num_bytes = piece
                self._mapping.touch(offset, num_bytes)
                with self._lock:
                    self._untouched_bytes[segment] -= num_bytes
                    is_whole = self._untouched_bytes[segment] == 0
                if is_whole:
                    for part, is_registered in self._register(segment):
                        self._on_ready(part, is_registered)
        except Exception as error:  # whatever it is, somebody waits for this memory
            with self._lock:
                self._slices.clear()
            is_ours = isinstance(error, FlashError)
            self.error = error if is_ours else TransferError(f"making the host pool failed: {error!r}")
            self._on_error(self.error)

    def _next_slice(self) -> tuple[Segment, int, int] | None:
        with self._lock:
            return self._slices.popleft() if self._slices else None

    def _register(self, segment: Segment) -> Iterator[tuple[Segment, bool]]:
        """Register a segment, in halves where the system refuses it whole.

        What is refused even so stays usable, at the speed of pageable memory.
        """
        if self._pinning is None:
            yield segment, False
            return
        address = self._mapping.address + segment.offset
        try:
            self._pinning.register(address, segment.num_bytes)
        except TransferError as error:
            self.pinning_problem = error.message
            half = segment.num_bytes // 2 // self._page_bytes * self._page_bytes
            if half < MIN_SEGMENT_BYTES:
                yield segment, False
                return
            yield from self._register(Segment(segment.offset, half))
            yield from self._register(Segment(segment.offset + half, segment.num_bytes - half))
        else:
            with self._lock:
                self._registered.append(address)
            yield segment, True
