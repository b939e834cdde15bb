"""Sends what a page holds to its places in the arena."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import TransferError, UnsupportedModel
from ..memory.arena import Arena
from .blocks import Block, Segment
from .driver_copies import DriverCopies, find_driver_copies
from .load_plan import Extent


class BlockCopier:
    """Copies blocks into an arena, converting elements on the way where the plan wants it.

    On a device the copies are queued on the current stream.

    Args:
        arena: Borrowed.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._arena_B = arena.bytes_B
        self._address = self._arena_B.data_ptr()
        self._driver = find_driver_copies(arena.device)
        self._overflows: dict[str, tuple[Extent, Tensor]] = {}

    def copy(self, block: Block, page_B: Tensor, *, is_pinned: bool = False) -> int:
        """Copy a block's segments from the page that it was read to; returns how many copies were queued for it.

        Args:
            block: What of the page goes where.
            page_B: The page.
            is_pinned: Whether it is locked, so that the device fetches it by itself.

        Raises:
            TransferError: The device failed.
        """
        driver = self._driver if is_pinned else None
        plain = [segment for segment in block.segments if segment.converted is None]
        converted = [segment for segment in block.segments if segment.converted is not None]
        try:
            for segment in block.segments:
                self._arena.reach(segment.arena_offset, segment.arena_offset + segment.arena_bytes)
            if driver is not None and plain:
                self._copy_batch(driver, plain, page_B)
            else:
                for segment in plain:
                    self._copy_bytes(segment, page_B)
            for segment in converted:
                self._convert(segment, page_B)
        except (RuntimeError, TransferError) as error:
            raise TransferError(
                f"{block.path}: copying bytes {block.file_offset} to {block.file_offset + block.num_bytes} to "
                f"{self._arena_B.device} failed: {error}"
            ) from error
        return len(converted) + (len(plain) if driver is None else 1)

    def check(self) -> None:
        """Raise `UnsupportedModel` where a finite value became infinite; waits for the copies."""
        for extent, has_overflown in self._overflows.values():
            if bool(has_overflown):
                raise UnsupportedModel(
                    f"{extent.path}: tensor {extent.name!r} has values beyond float16, whose largest is 65504; "
                    "load the model as bfloat16 or float32"
                )

    def _copy_batch(self, driver: DriverCopies, segments: Sequence[Segment], page_B: Tensor) -> None:
        page_address = page_B.data_ptr()
        driver.copy(
            [self._address + segment.arena_offset for segment in segments],
            [page_address + segment.block_offset for segment in segments],
            [segment.num_bytes for segment in segments],
        )

    def _copy_bytes(self, segment: Segment, page_B: Tensor) -> None:
        source_B = page_B[segment.block_offset : segment.block_offset + segment.num_bytes]
        target_B = self._arena_B[segment.arena_offset : segment.arena_offset + segment.num_bytes]
        target_B.copy_(source_B, non_blocking=True)

    def _convert(self, segment: Segment, page_B: Tensor) -> None:
        extent = segment.converted
        assert extent is not None
        source_B = page_B[segment.block_offset : segment.block_offset + segment.num_bytes]
        if segment.block_offset % extent.source_dtype.itemsize != 0:
            source_B = source_B.clone()  # torch wants elements aligned
        end = segment.arena_offset + segment.arena_bytes
        target = self._arena_B[segment.arena_offset : end].view(extent.target_dtype)
        source = source_B.to(target.device, non_blocking=True).view(extent.source_dtype)
        target.copy_(source)
        if extent.target_dtype == torch.float16:
            has_overflown = (torch.isfinite(source) & ~torch.isfinite(target)).any()
            _, before = self._overflows.get(extent.name, (extent, has_overflown))
            self._overflows[extent.name] = (extent, before | has_overflown)
