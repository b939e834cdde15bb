"""The reading half of a load: threads fill pages with blocks, in the order in which they are needed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ..checkpoint.chunk_digests import DigestCheck
from ..memory.host_pool import Page
from .blocks import Block
from .host_image import HostImage
from .page_source import PageSource
from .readers.files import Reader

SLICE_BYTES = 4 * 1024**2
"""What a thread reads of a block at once: the threads share the first blocks, so that copying begins early."""


@dataclass(slots=True)
class _OpenBlock:
    """A block that has a page, and of which something is still to be read."""

    index: int
    page: Page
    is_kept: bool
    """Whether the page stays in the host tier."""
    next_start: int
    unread_bytes: int


class BlockReads:
    """Reads blocks of one load; `work` is called from several threads.

    Args:
        blocks: All blocks of the load.
        missing: Indexes of those that are read, in order.
        pages: Gives pages.
        reader: Fills them.
        check: Checks what was read; None: nothing does.
        image: Keeps blocks where there are pages for it; None: no block is kept.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        missing: Iterable[int],
        *,
        pages: PageSource,
        reader: Reader,
        check: DigestCheck | None,
        image: HostImage | None,
    ) -> None:
        self._blocks = blocks
        self._unopened = deque(missing)
        self._pages = pages
        self._reader = reader
        self._check = check
        self._image = image
        self._opening = threading.Lock()
        """Held from the wish for a page until a block has it; `_unopened` changes under it."""
        self._lock = threading.Lock()
        self._unhanded: deque[_OpenBlock] = deque()
        self._open: dict[int, _OpenBlock] = {}
        self._read: dict[int, Page] = {}
        self.num_blocks = len(self._unopened)
        """Blocks that are read if nothing fails."""
        self.num_bytes = sum(blocks[index].used_bytes for index in self._unopened)
        """Bytes for the arena in these."""
        self.done_bytes = 0
        """Bytes for the arena in the blocks that were read."""

    def work(self, is_stopping: Callable[[], bool], announce: Callable[[], None]) -> None:
        """Read until nothing is left, or no page is to be had.

        Args:
            is_stopping: Asked before each read whether to return at once.
            announce: Called when a block was read.
        """
        while not is_stopping() and (taken := self._next_slice()) is not None:
            block, start, end = taken
            self._read_slice(block, start, end)
            if self._finish_slice(block, end - start):
                announce()

    def find(self, index: int) -> Page | None:
        """The page that holds a block by now, in the host tier or on its way; None before it was read."""
        kept = self._image.find(index) if self._image is not None else None
        return kept or self._read.get(index)

    def release(self, index: int, record: Callable[[], torch.cuda.Event | None]) -> None:
        """Let others have a block's page, unless it is kept, once what `record` returns is over."""
        page = self._read.pop(index, None)
        if page is not None:
            self._pages.put(page, record(), is_kept=False)

    def close(self) -> None:
        """Return the pages of blocks that were not read to their end; no thread is at work any more."""
        for block in self._open.values():
            self._pages.put(block.page, None, is_kept=block.is_kept)
        self._open.clear()

    def _next_slice(self) -> tuple[_OpenBlock, int, int] | None:
        if (taken := self._find_slice()) is not None:
            return taken
        # One at a time: whoever took a page beside others could find no block left for it, while they had opened the
        # last one on a page of the ring. A page comes before a block: who has the first in order can always read it.
        with self._opening:
            if (taken := self._find_slice()) is not None or not self._unopened:
                return taken
            page = self._pages.take()
            return None if page is None else self._open_block(*page)

    def _find_slice(self) -> tuple[_OpenBlock, int, int] | None:
        """Something to read of a block that is open; None where all of them is handed out."""
        with self._lock:
            return self._hand_out(self._unhanded[0]) if self._unhanded else None

    def _hand_out(self, block: _OpenBlock) -> tuple[_OpenBlock, int, int]:
        num_bytes = self._blocks[block.index].num_bytes
        start = block.next_start
        block.next_start = min(start + SLICE_BYTES, num_bytes)
        if block.next_start == num_bytes:
            self._unhanded.popleft()
        return block, start, block.next_start

    def _open_block(self, page: Page, is_kept: bool) -> tuple[_OpenBlock, int, int]:
        """Give the next block a page; returns its first slice. The block stands alone: nothing else is unhanded."""
        with self._lock:
            index = self._unopened.popleft()
            block = _OpenBlock(index, page, is_kept, 0, self._blocks[index].num_bytes)
            self._open[index] = block
            self._unhanded.append(block)
            return self._hand_out(block)

    def _read_slice(self, opened: _OpenBlock, start: int, end: int) -> None:
        block = self._blocks[opened.index]
        self._reader.read_into(block.path, block.file_offset + start, opened.page.buffer[start:end])

    def _finish_slice(self, opened: _OpenBlock, num_bytes: int) -> bool:
        """Count what was read; True when it was the block's last slice."""
        with self._lock:
            opened.unread_bytes -= num_bytes
            if opened.unread_bytes > 0:
                return False
        block = self._blocks[opened.index]
        if self._check is not None:
            self._check.check(block.path, block.file_offset, opened.page.buffer[: block.num_bytes])
        with self._lock:
            if opened.is_kept and self._image is not None:
                self._image.keep(opened.index, opened.page)
            else:
                self._read[opened.index] = opened.page
            del self._open[opened.index]
            self.done_bytes += block.used_bytes
        return True
