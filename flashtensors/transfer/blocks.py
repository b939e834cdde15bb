"""The reads of a load: whole chunks of files, in the order in which the model computes with what they hold.

A file is read in chunks of one size that begin at multiples of it, so reads are aligned for O_DIRECT, no byte is read
twice, and the digest of a chunk can be checked where it was read to. A chunk is read when the first layer that needs
any of it is due; what else it holds goes to the arena at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .load_plan import Extent, LoadPlan


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes of a block that go to one place of the arena."""

    block_offset: int
    num_bytes: int
    """In the file."""
    arena_offset: int
    converted: Extent | None = None
    """The extent whose dtypes say how the elements change on the way; None where the bytes are copied as they are."""

    @property
    def arena_bytes(self) -> int:
        """Bytes that the segment takes in the arena."""
        if self.converted is None:
            return self.num_bytes
        return self.num_bytes // self.converted.source_dtype.itemsize * self.converted.target_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Block:
    """A chunk of a file, and what of it goes where."""

    path: Path
    file_offset: int
    num_bytes: int
    """Of the chunk; some bytes more where its end cuts an element that is converted."""
    stage: int
    """The first stage that needs it."""
    segments: tuple[Segment, ...]
    """In the order of the file."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the file that go to the arena."""
        return sum(segment.num_bytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of a plan in the order in which they are read."""

    blocks: tuple[Block, ...]
    last_stages: dict[int | None, int]
    """By decoder layer: the last stage that belongs to it. None stands for what comes after the last layer."""
    chunk_bytes: int

    @property
    def num_stages(self) -> int:
        """Stages of the plan."""
        return max(self.last_stages.values(), default=-1) + 1


def make_blocks(plan: LoadPlan, chunk_bytes: int) -> BlockList:
    """Cut the files of `plan` into blocks.

    A stage is a run of extents of one decoder layer, or of none; everything that a stage needs is in the blocks up to
    the last one of its number.

    Args:
        plan: Its extents are in the order of execution.
        chunk_bytes: Length of a chunk, a multiple of 4096.
    """
    chunks: dict[tuple[Path, int], tuple[int, list[Segment]]] = {}
    last_stages: dict[int | None, int] = {}
    stage = 0
    previous: Extent | None = None
    for extent in plan.extents:
        if previous is not None and extent.layer != previous.layer:
            stage += 1
        previous = extent
        last_stages[extent.layer] = stage
        for index, segment in _cut(extent, chunk_bytes):
            chunks.setdefault((extent.path, index), (stage, []))[1].append(segment)
    blocks = [
        _make_block(plan, path, index * chunk_bytes, chunk_bytes, stage, segments)
        for (path, index), (stage, segments) in chunks.items()
    ]
    order = {path: index for index, path in enumerate(plan.files)}
    blocks.sort(key=lambda block: (block.stage, order[block.path], block.file_offset))
    return BlockList(tuple(blocks), last_stages, chunk_bytes)


def _cut(extent: Extent, chunk_bytes: int) -> list[tuple[int, Segment]]:
    """The extent's part in each chunk, by the chunk's index; an element belongs to the chunk that it begins in."""
    itemsize = extent.source_dtype.itemsize if extent.is_converted else 1
    scale = extent.target_dtype.itemsize if extent.is_converted else 1
    parts: list[tuple[int, Segment]] = []
    start = 0
    while start < extent.num_bytes:
        index, block_offset = divmod(extent.file_offset + start, chunk_bytes)
        end = min(start - (block_offset - chunk_bytes) // itemsize * itemsize, extent.num_bytes)
        arena_offset = extent.arena_offset + start // itemsize * scale
        converted = extent if extent.is_converted else None
        parts.append((index, Segment(block_offset, end - start, arena_offset, converted)))
        start = end
    return parts


def _make_block(
    plan: LoadPlan, path: Path, file_offset: int, chunk_bytes: int, stage: int, segments: list[Segment]
) -> Block:
    merged: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.block_offset):
        last = merged[-1] if merged else None
        if last is not None and _are_adjacent(last, segment):
            merged[-1] = Segment(last.block_offset, last.num_bytes + segment.num_bytes, last.arena_offset)
        else:
            merged.append(segment)
    in_chunk = min(chunk_bytes, plan.files[path].num_bytes - file_offset)
    num_bytes = max(in_chunk, merged[-1].block_offset + merged[-1].num_bytes)
    return Block(path, file_offset, num_bytes, stage, tuple(merged))


def _are_adjacent(left: Segment, right: Segment) -> bool:
    return (
        left.converted is None
        and right.converted is None
        and left.block_offset + left.num_bytes == right.block_offset
        and left.arena_offset + left.num_bytes == right.arena_offset
    )
