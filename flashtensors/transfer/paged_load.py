"""A load by way of pages: threads read blocks to pages, one thread copies the pages to the arena in order."""

from __future__ import annotations

import threading
from collections import deque

from ..checkpoint.chunk_digests import DigestCheck
from ..memory.arena import Arena
from ..memory.host_pool import Page
from .blocks import BlockList
from .copies import BlockCopier
from .copy_stream import make_copy_stream
from .crew import Crew, Progress, ProgressTicker
from .host_image import HostImage
from .layer_events import LayerEvents
from .page_source import PageSource
from .readers.files import Reader


class PagedLoad:
    """One load into an arena, or with no arena into the host tier alone.

    Args:
        block_list: What to move.
        arena: Where to; None: only the image is filled.
        image: Has some of the blocks, and takes in those that are read.
        pages: Pages to read to.
        reader: Reads what the image lacks.
        check: Checks what was read.
        events: Told about layers that have landed.
        cancel: Set it to make the load raise soon.
    """

    def __init__(
        self,
        block_list: BlockList,
        arena: Arena | None,
        *,
        image: HostImage | None,
        pages: PageSource,
        reader: Reader,
        check: DigestCheck | None,
        events: LayerEvents | None,
        cancel: threading.Event,
    ) -> None:
        self._blocks = block_list.blocks
        self._last_stage = max(block_list.last_stages.values(), default=-1)
        self._arena = arena
        self._image = image
        self._pages = pages
        self._reader = reader
        self._check = check
        self._events = events
        self._cancel = cancel
        self._lock = threading.Lock()
        self._unread = deque(missing_blocks(block_list, image))
        self._read: dict[int, Page] = {}
        self._done_bytes = 0

    def run(self, num_threads: int, progress: Progress | None, total_bytes: int) -> None:
        """Move all blocks; returns, or raises the first error, when no read or copy is under way any more."""
        ticker = ProgressTicker(progress, total_bytes, lambda: self._done_bytes)
        num_threads = min(num_threads, len(self._unread))
        crew = Crew(num_threads, lambda: self._read_blocks(crew), self._cancel, on_stop=self._pages.stop)
        with crew:
            if self._arena is None:
                crew.wait_for(lambda: crew.is_done, ticker)
            else:
                self._copy_blocks(self._arena, crew, ticker)
        ticker.finish()

    # The threads that read.

    def _read_blocks(self, crew: Crew) -> None:
        # A page comes before a block: whoever has the first block in order can always read it.
        while not crew.is_stopping and self._unread and (taken := self._pages.take()) is not None:
            page, is_kept = taken
            index = self._next_unread()
            if index is None:
                self._pages.put(page, None, is_kept=is_kept)
                return
            try:
                self._read_block(index, page)
            except BaseException:
                self._pages.put(page, None, is_kept=is_kept)
                raise
            if is_kept and self._image is not None:
                self._image.keep(index, page)
            else:
                self._read[index] = page
            crew.announce()

    def _next_unread(self) -> int | None:
        with self._lock:
            return self._unread.popleft() if self._unread else None

    def _read_block(self, index: int, page: Page) -> None:
        block = self._blocks[index]
        data = page.buffer[: block.num_bytes]
        self._reader.read_into(block.path, block.file_offset, data)
        if self._check is not None:
            self._check.check(block.path, block.file_offset, data)
        if self._arena is None:
            with self._lock:
                self._done_bytes += block.used_bytes

    # The thread that copies.

    def _copy_blocks(self, arena: Arena, crew: Crew, ticker: ProgressTicker) -> None:
        stream = make_copy_stream(arena.device)
        copier = BlockCopier(arena)
        stage = 0
        try:
            with stream.use():
                for index, block in enumerate(self._blocks):
                    if block.stage > stage and self._events is not None:
                        self._events.landed(block.stage, stream.record())
                    stage = block.stage
                    crew.wait_for(lambda index=index: self._find(index) is not None, ticker)
                    page = self._find(index)
                    assert page is not None
                    copier.copy(block, page.bytes_B)
                    if self._read.pop(index, None) is not None:
                        self._pages.put(page, stream.record(), is_kept=False)
                    self._done_bytes += block.used_bytes
                if self._events is not None:
                    self._events.landed(self._last_stage + 1, stream.record())
        finally:
            stream.synchronize()
        copier.check()

    def _find(self, index: int) -> Page | None:
        """The page that holds a block by now."""
        kept = self._image.find(index) if self._image is not None else None
        return kept or self._read.get(index)


def missing_blocks(block_list: BlockList, image: HostImage | None) -> list[int]:
    """Indexes of the blocks that have to be read."""
    return [index for index in range(len(block_list.blocks)) if image is None or image.find(index) is None]
