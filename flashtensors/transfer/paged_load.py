"""A load by way of pages: threads read blocks to pages, one thread copies the pages to the arena in order."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..memory.arena import Arena
from .block_reads import BlockReads
from .blocks import BlockList
from .copies import BlockCopier
from .copy_stream import CopyStream, make_copy_stream
from .copy_window import CopyWindow
from .crew import Crew, Progress, ProgressTicker
from .layer_events import LayerEvents
from .page_source import PageSource


class PagedLoad:
    """One load into an arena, or with no arena into the host tier alone.

    Args:
        block_list: What to move.
        arena: Where to; None: nothing is copied.
        reads: Brings the blocks.
        pages: Where the pages come from.
        events: Told about layers that have landed.
        cancel: Set it to make the load raise soon.
        on_queued: Called when every copy is queued, and before they are waited for.
    """

    def __init__(
        self,
        block_list: BlockList,
        arena: Arena | None,
        *,
        reads: BlockReads,
        pages: PageSource,
        events: LayerEvents | None,
        cancel: threading.Event,
        on_queued: Callable[[], None] | None = None,
    ) -> None:
        self._blocks = block_list.blocks
        self._num_stages = block_list.num_stages
        self._arena = arena
        self._reads = reads
        self._pages = pages
        self._events = events
        self._cancel = cancel
        self._on_queued = on_queued
        self._copied_bytes = 0

    def run(self, num_threads: int, progress: Progress | None, total_bytes: int) -> None:
        """Move all blocks; returns, or raises the first error, when no read or copy is under way any more."""
        ticker = ProgressTicker(progress, total_bytes, self._find_done_bytes)
        num_threads = min(num_threads, self._reads.num_blocks)
        crew = Crew(num_threads, self._read, self._cancel, on_stop=self._pages.stop)
        try:
            with crew:
                if self._arena is None:
                    crew.wait_for(lambda: crew.is_done, ticker)
                else:
                    self._copy(self._arena, crew, ticker)
        finally:
            self._reads.close()
        ticker.finish()

    def _find_done_bytes(self) -> int:
        return self._copied_bytes if self._arena is not None else self._reads.done_bytes

    def _read(self, crew: Crew) -> None:
        self._reads.work(lambda: crew.is_stopping, crew.announce)

    def _copy(self, arena: Arena, crew: Crew, ticker: ProgressTicker) -> None:
        stream = make_copy_stream(arena.device)
        copier = BlockCopier(arena)
        try:
            with stream.use():
                self._copy_blocks(copier, stream, crew, ticker)
            if self._on_queued is not None:
                self._on_queued()
        finally:
            stream.synchronize()
        copier.check()

    def _copy_blocks(self, copier: BlockCopier, stream: CopyStream, crew: Crew, ticker: ProgressTicker) -> None:
        window = CopyWindow(stream)
        stage = 0
        for index, block in enumerate(self._blocks):
            if block.stage > stage and self._events is not None:
                self._events.landed(block.stage, stream.record())
            stage = block.stage
            crew.wait_for(lambda index=index: self._reads.find(index) is not None, ticker)
            page = self._reads.find(index)
            assert page is not None, "what was read stays until it is released"
            window.add(copier.copy(block, page.bytes_B, is_pinned=page.is_pinned))
            self._reads.release(index, stream.record)
            self._copied_bytes += block.used_bytes
        if self._events is not None:
            self._events.landed(self._num_stages, stream.record())
