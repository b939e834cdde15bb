"""The host pool: pages of host memory that files are read into and the device copies from.

The pool is made in the background, segment by segment: several threads touch a segment, one of them registers it with
the device, and its pages can be used. Registering is what `cudaHostAlloc` spends its time on (2.7 GB/s); memory in huge
pages that was touched before registers at 19 GB/s in one thread and faster in several. Segments hold whole pages, so a
copy never crosses the edge of a registration, which CUDA refuses.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from ..closing import Closing
from ..errors import CapacityError, FlashError
from .host_mapping import HostMapping
from .host_segments import SEGMENT_BYTES, Segment, SegmentBuilder, cut_segments
from .pinning import Pinning

PAGE_SLACK_BYTES = 4096
"""Bytes of a page beyond the chunk of a file that it holds: room for an element that the chunk's end cuts."""


READY_BYTES = 512 * 1024**2
"""Free memory that is kept ready while a load is under way; more is made when the load has ended."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a pool's memory, owned by who allocated it until it is given back."""

    index: int
    bytes_B: Tensor
    """Begins at a multiple of 4096."""
    is_pinned: bool
    buffer: memoryview = field(repr=False)
    """The same bytes, for system calls."""


class HostPool(Closing):
    """Pages of one size. Any number of threads may use it.

    Args:
        num_bytes: Memory to take; the pool has the whole pages that fit.
        chunk_bytes: Bytes of a file that one page holds, a multiple of 4096.
        pinning: Registers the memory with the device; None on machines without one.
        num_threads: Threads that touch and register, in the background.
        fd: A memory file of at least `num_bytes`, borrowed while the constructor runs; None: anonymous memory.
        reserved: Indexes of pages that hold what another process left in the memory file. Nobody gets them before
            they are claimed, or freed.

    Raises:
        CapacityError: The system does not map that much, or not even one page was asked for.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        chunk_bytes: int,
        pinning: Pinning | None = None,
        num_threads: int = 8,
        fd: int | None = None,
        reserved: Collection[int] = (),
    ) -> None:
        assert chunk_bytes % 4096 == 0, f"chunks of {chunk_bytes} bytes cannot be read directly"
        self.chunk_bytes = chunk_bytes
        self.page_bytes = chunk_bytes + PAGE_SLACK_BYTES
        self.num_pages = num_bytes // self.page_bytes
        if self.num_pages == 0:
            raise CapacityError(f"a host pool of {num_bytes} bytes holds no page of {self.page_bytes}; give it more")
        self.num_bytes = self.num_pages * self.page_bytes
        self._mapping = HostMapping(self.num_bytes, fd)
        self._changed = threading.Condition()
        self._free: list[int] = []
        self._reserved = set(reserved)
        assert all(0 <= index < self.num_pages for index in self._reserved), "reserved pages that are not there"
        self._owned = set(self._reserved)
        self._ready: set[int] = set()
        self._unpinned: set[int] = set()
        self._num_loads = 0
        self._is_closed = False
        segments = cut_segments(self.num_bytes, self.page_bytes, SEGMENT_BYTES)
        self._builder = SegmentBuilder(
            self._mapping, segments, self.page_bytes, pinning, self._wait_turn, self._segment_ready, self._wake
        )
        self._builder.start(num_threads)

    # State.

    @property
    def ready_bytes(self) -> int:
        """Bytes of the pages that can be used by now."""
        return len(self._ready) * self.page_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes of ready pages that the device can fetch at the link's speed."""
        return (len(self._ready) - len(self._unpinned)) * self.page_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of pages that nobody owns, those that are not ready yet among them."""
        with self._changed:
            return (self.num_pages - len(self._owned)) * self.page_bytes

    @property
    def pinning_problem(self) -> str | None:
        """Why some pages are not registered; None when all are, or no device wants them."""
        return self._builder.pinning_problem

    def wait(self, num_bytes: int | None = None, timeout_s: float | None = None) -> bool:
        """Wait until `num_bytes` (None: all) are ready; False when the time was too short.

        Raises:
            CapacityError: The system ran out of memory.
        """
        wanted = self.num_bytes if num_bytes is None else min(num_bytes, self.num_bytes)
        with self._changed:
            is_ready = self._changed.wait_for(lambda: self.ready_bytes >= wanted or self._cannot_grow(), timeout_s)
        if self.ready_bytes < wanted and self._builder.error is not None:
            raise self._builder.error
        return is_ready and self.ready_bytes >= wanted

    # Pages.

    def allocate(self) -> Page | None:
        """A page, waiting for the next segment where need be; None when all pages are owned."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free) or self._cannot_grow())
            return self._take(heapq.heappop(self._free)) if self._free and not self._is_closed else None

    def allocate_up_to(self, num_pages: int) -> list[Page]:
        """As many pages as are ready, at most `num_pages`; waits for the first of them where need be."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._free) or self._cannot_grow())
            num_pages = 0 if self._is_closed else min(num_pages, len(self._free))
            return [self._take(heapq.heappop(self._free)) for _ in range(num_pages)]

    def claim(self, index: int) -> Page:
        """A certain page, with what it holds: how a process that starts again takes its pages back.

        Raises:
            CapacityError: It is owned already, or there is no such page.
        """
        with self._changed:
            self._changed.wait_for(lambda: index in self._ready or self._cannot_grow())
            if index in self._ready and index in self._reserved:
                self._reserved.remove(index)
            elif index in self._free:
                self._free.remove(index)
                heapq.heapify(self._free)
            else:
                raise CapacityError(f"page {index} of a host pool of {self.num_pages} pages is not free")
            return self._take(index)

    def free_reserved(self, indexes: Iterable[int]) -> None:
        """Let others have pages that were reserved and not claimed; nothing is waited for."""
        with self._changed:
            for index in indexes:
                self._reserved.remove(index)
                self._owned.remove(index)
                if index in self._ready:
                    heapq.heappush(self._free, index)
            self._changed.notify_all()

    def give_back(self, page: Page) -> None:
        """Let others have a page; nothing may read from or write to it any more."""
        with self._changed:
            assert page.index in self._owned, f"page {page.index} is not owned"
            self._owned.remove(page.index)
            heapq.heappush(self._free, page.index)
            self._changed.notify_all()

    @contextmanager
    def go_first(self) -> Iterator[None]:
        """While the block lasts, make no more of the pool than it needs.

        Registering memory holds locks of the driver that copies wait for: a load beside it would be four times slower.
        """
        with self._changed:
            self._num_loads += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_loads -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Stop what runs in the background and unregister the memory, which goes back when no page is used any more.

        No copy from the pool may be under way.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._builder.close()
        self._mapping.close()

    def _take(self, index: int) -> Page:
        self._owned.add(index)
        if self._num_loads > 0:
            self._changed.notify_all()
        start = index * self.page_bytes
        bytes_B = self._mapping.bytes_B[start : start + self.page_bytes]
        return Page(index, bytes_B, is_pinned=index not in self._unpinned, buffer=bytes_B.numpy().data)

    def _wait_turn(self) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._num_loads == 0 or self._is_closed or len(self._free) * self.page_bytes < READY_BYTES
            )

    def _cannot_grow(self) -> bool:
        return self._is_closed or len(self._ready) == self.num_pages or self._builder.error is not None

    def _segment_ready(self, segment: Segment, is_pinned: bool) -> None:
        pages = range(segment.offset // self.page_bytes, (segment.offset + segment.num_bytes) // self.page_bytes)
        with self._changed:
            if not is_pinned:
                self._unpinned.update(pages)
            self._ready.update(pages)
            for index in pages:
                if index not in self._owned:
                    heapq.heappush(self._free, index)
            self._changed.notify_all()

    def _wake(self, error: FlashError) -> None:
        with self._changed:
            self._changed.notify_all()
