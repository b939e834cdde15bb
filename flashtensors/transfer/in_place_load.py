"""A load into host memory without pages: threads read each tensor's bytes to their place."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from ..checkpoint.chunk_digests import DigestCheck
from ..memory.arena import Arena
from ..memory.host_pool import PAGE_SLACK_BYTES
from .blocks import Block, BlockList
from .copies import BlockCopier
from .crew import Crew, Progress, ProgressTicker
from .readers.files import Reader


class InPlaceLoad:
    """One load into a host arena.

    Only blocks that are checked or converted take the way over a scratch page, of which every thread has one.

    Args:
        block_list: What to move.
        arena: Host memory.
        reader: Reads.
        check: Checks what was read.
        cancel: Set it to make the load raise soon.
    """

    def __init__(
        self,
        block_list: BlockList,
        arena: Arena,
        *,
        reader: Reader,
        check: DigestCheck | None,
        cancel: threading.Event,
    ) -> None:
        self._chunk_bytes = block_list.chunk_bytes
        self._memory = arena.host_memory()
        self._copier = BlockCopier(arena)
        self._reader = reader
        self._check = check
        self._cancel = cancel
        self._unread = deque(block_list.blocks)
        self._lock = threading.Lock()
        self._done_bytes = 0

    def run(self, num_threads: int, progress: Progress | None, total_bytes: int) -> None:
        """Move all blocks; returns, or raises the first error, when no read is under way any more."""
        ticker = ProgressTicker(progress, total_bytes, lambda: self._done_bytes)
        crew = Crew(min(num_threads, len(self._unread)), self._read_blocks, self._cancel)
        with crew:
            crew.wait_for(lambda: crew.is_done and not self._unread, ticker)
        self._copier.check()
        ticker.finish()

    def _read_blocks(self, crew: Crew) -> None:
        scratch_B: Tensor | None = None
        while not crew.is_stopping:
            try:
                block = self._unread.popleft()
            except IndexError:  # the others took the rest
                return
            if self._check is None and all(segment.converted is None for segment in block.segments):
                self._read_to_place(block)
            else:
                if scratch_B is None:
                    scratch_B = torch.empty(self._chunk_bytes + PAGE_SLACK_BYTES, dtype=torch.uint8)
                self._read_over(scratch_B, block)
            with self._lock:
                self._done_bytes += block.used_bytes

    def _read_to_place(self, block: Block) -> None:
        for segment in block.segments:
            target = self._memory[segment.arena_offset : segment.arena_offset + segment.num_bytes]
            self._reader.read_into(block.path, block.file_offset + segment.block_offset, target)

    def _read_over(self, scratch_B: Tensor, block: Block) -> None:
        data = scratch_B.numpy().data[: block.num_bytes]
        self._reader.read_into(block.path, block.file_offset, data)
        if self._check is not None:
            self._check.check(block.path, block.file_offset, data)
        self._copier.copy(block, scratch_B)
