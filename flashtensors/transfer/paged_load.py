"""A load by way of pages: threads read blocks to pages, one thread copies the pages to the arena in order.

Who computes on a GPU may begin before all is read: when what is left will be, at the rate so far, within `EARLY_S`. A
step that begins then waits for its last layers in the thread that launches it, which should not wait long for a disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from ..memory.arena import Arena
from .block_reads import BlockReads
from .blocks import BlockList
from .copies import BlockCopier
from .copy_stream import CopyStream, make_copy_stream
from .copy_window import CopyWindow
from .crew import Crew, Progress, ProgressTicker
from .layer_events import LayerEvents
from .page_source import PageSource

EARLY_S = 0.25
"""Seconds of reading that may be left when requests start."""


class PagedLoad:
    """One load into an arena, or with no arena into the host tier alone.

    Args:
        block_list: What to move.
        arena: Where to; None: nothing is copied.
        reads: Brings the blocks.
        pages: Where the pages come from.
        events: Told about layers that have landed.
        cancel: Set it to make the load raise soon.
        on_near: Called once, when every copy is queued or will soon be, and before they are waited for.
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
        on_near: Callable[[], None] | None = None,
    ) -> None:
        self._blocks = block_list.blocks
        self._num_stages = block_list.num_stages
        self._arena = arena
        self._reads = reads
        self._pages = pages
        self._events = events
        self._cancel = cancel
        self._on_near = on_near
        self._started_s = 0.0
        self._copied_bytes = 0

    def run(self, num_threads: int, progress: Progress | None, total_bytes: int) -> None:
        """Move all blocks; returns, or raises the first error, when no read or copy is under way any more."""
        self._started_s = time.perf_counter()
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
            copying = self._copy_blocks(copier, stream, crew, ticker)
            with stream.use():
                next(copying)
            if self._on_near is not None:
                self._on_near()
            with stream.use():
                next(copying, None)
        finally:
            stream.synchronize()
        copier.check()

    def _copy_blocks(
        self, copier: BlockCopier, stream: CopyStream, crew: Crew, ticker: ProgressTicker
    ) -> Iterator[None]:
        """Queue all copies; yields once, when they are queued or will soon be."""
        window = CopyWindow(stream)
        stage, is_near = 0, False
        for index, block in enumerate(self._blocks):
            if block.stage > stage and self._events is not None:
                self._events.landed(block.stage, stream.record())
            stage = block.stage
            if not is_near and stream.has_events and self._reads.find(index) is None and self._is_near():
                is_near = True
                yield
            crew.wait_for(lambda index=index: self._reads.find(index) is not None, ticker)
            page = self._reads.find(index)
            assert page is not None, "what was read stays until it is released"
            window.add(copier.copy(block, page.bytes_B, is_pinned=page.is_pinned))
            self._reads.release(index, stream.record)
            self._copied_bytes += block.used_bytes
        if self._events is not None:
            self._events.landed(self._num_stages, stream.record())
        if not is_near:
            yield

    def _is_near(self) -> bool:
        """Whether what is left to read will have been read within `EARLY_S`, at the rate so far."""
        done_bytes = self._reads.done_bytes
        seconds = time.perf_counter() - self._started_s
        return seconds * (self._reads.num_bytes - done_bytes) <= EARLY_S * done_bytes
