"""Where the pages come from that blocks are read to: the host tier while it has room, else a ring."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import torch

from ..memory.host_pool import PAGE_SLACK_BYTES, HostPool, Page
from ..memory.pinning import find_pinning
from .host_image import HostImage
from .staging import StagingRing

MIN_RING_PAGES = 2
"""One page is read to while another is copied from."""


class PageSource:
    """Pages for one load.

    Args:
        pool: Gives the pages of the ring; None, or a pool that is full: memory is pinned for this load.
        image: Keeps what is read while its pool has pages; None: everything goes through the ring.
        num_pages: Blocks that will be read.
        ring_pages: Pages of a ring; 0: only the image's pages are used.
        chunk_bytes: Bytes of a file that a page must hold.
        device: Where the pages are copied to.
    """

    def __init__(
        self,
        *,
        pool: HostPool | None,
        image: HostImage | None,
        num_pages: int,
        ring_pages: int,
        chunk_bytes: int,
        device: torch.device,
    ) -> None:
        self._pool = pool
        self._image = image
        self._ring_pages = min(ring_pages, num_pages)
        self._chunk_bytes = chunk_bytes
        self._device = device
        self._lock = threading.Lock()
        self._borrowed: list[Page] = []
        self._own_pool: HostPool | None = None
        self._ring: StagingRing | None = None
        self._is_stopped = False
        has_room = image is not None and image.room_bytes >= num_pages * image.pool.page_bytes
        if self._ring_pages > 0 and not has_room:
            self._open_ring()

    def take(self) -> tuple[Page, bool] | None:
        """A page to read to, and whether the image keeps it; waits for one. None when there is none."""
        if self._image is not None and (page := self._image.take_page()) is not None:
            return page, True
        page = self._open_ring().take() if self._ring_pages > 0 else None
        return None if page is None else (page, False)

    def put(self, page: Page, copied: torch.cuda.Event | None, *, is_kept: bool) -> None:
        """Return a page once `copied` is over (None: at once)."""
        if is_kept:
            assert self._image is not None
            self._image.put_page(page)
        else:
            self._open_ring().put(page, copied)

    def stop(self) -> None:
        """Send away all who wait for a page."""
        with self._lock:
            self._is_stopped = True
            if self._ring is not None:
                self._ring.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the ring's pages back; no copy from them is under way any more."""
        self._give_back_borrowed()
        if self._own_pool is not None:
            self._own_pool.close()

    def _open_ring(self) -> StagingRing:
        with self._lock:
            if self._ring is None:
                self._ring = StagingRing(self._find_ring_pages())
                if self._is_stopped:
                    self._ring.stop()
            return self._ring

    def _find_ring_pages(self) -> list[Page]:
        if self._pool is not None:
            self._borrowed = self._pool.allocate_up_to(self._ring_pages)
            if len(self._borrowed) >= min(MIN_RING_PAGES, self._ring_pages):
                return self._borrowed
            self._give_back_borrowed()
        num_bytes = self._ring_pages * (self._chunk_bytes + PAGE_SLACK_BYTES)
        own_pool = HostPool(num_bytes, chunk_bytes=self._chunk_bytes, pinning=find_pinning(self._device))
        pages = own_pool.allocate_up_to(self._ring_pages)
        if not pages:
            try:
                own_pool.wait(own_pool.page_bytes)  # says what the system said
            finally:
                own_pool.close()
        self._own_pool = own_pool
        return pages

    def _give_back_borrowed(self) -> None:
        borrowed, self._borrowed = self._borrowed, []
        for page in borrowed:
            assert self._pool is not None, "pages of no pool"
            self._pool.give_back(page)
