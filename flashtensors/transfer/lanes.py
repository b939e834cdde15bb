"""The way of one thread's pieces from a reader into an arena: straight into host memory, or by pinned chunks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..memory.arena import Arena
from .load_plan import Extent

NUM_STAGING_CHUNKS = 2
"""Pinned chunks of one lane: one is filled while the other is copied to the device."""


class Reader(Protocol):
    """A way of reading files. `read_into` is called from several threads at once."""

    @property
    def name(self) -> str:
        """What statistics call it."""
        ...

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of the file; raises `TruncatedFile` or `TransferError`."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of an extent that are moved at once."""

    extent: Extent
    start: int
    """Byte of the extent, in the file."""
    num_bytes: int
    """In the file."""

    @property
    def file_offset(self) -> int:
        """Where the piece lies in its file."""
        return self.extent.file_offset + self.start

    def target(self, arena: Arena) -> Tensor:
        """The piece's place in `arena`: bytes, or elements of the target's dtype when they are converted."""
        extent = self.extent
        scale = extent.target_dtype.itemsize / extent.source_dtype.itemsize
        offset = extent.arena_offset + int(self.start * scale)
        target_B = arena.bytes_B[offset : offset + int(self.num_bytes * scale)]
        return target_B.view(extent.target_dtype) if extent.is_converted else target_B


class Lane(Protocol):
    """Moves pieces, one after another; every thread has its own."""

    def move(self, piece: Piece, reader: Reader) -> None:
        """Read a piece and send it on its way into the arena."""
        ...

    def finish(self) -> None:
        """Wait until everything that was moved is in the arena."""
        ...


class HostLane:
    """Reads into host memory; a scratch chunk is used only for what is converted."""

    def __init__(self, arena: Arena, chunk_size: int) -> None:
        self._arena = arena
        self._chunk_size = chunk_size
        self._scratch_B: Tensor | None = None

    def move(self, piece: Piece, reader: Reader) -> None:
        """Read a piece to its place."""
        target = piece.target(self._arena)
        if not piece.extent.is_converted:
            reader.read_into(piece.extent.path, piece.file_offset, target.numpy().data)
            return
        if self._scratch_B is None:
            self._scratch_B = torch.empty(self._chunk_size, dtype=torch.uint8)
        source_B = self._scratch_B[: piece.num_bytes]
        reader.read_into(piece.extent.path, piece.file_offset, source_B.numpy().data)
        _convert(source_B, target, piece.extent)

    def finish(self) -> None:
        """Nothing is left to wait for."""


class DeviceLane:
    """Reads into a ring of pinned chunks, from which `stream` copies to the device while the next is read."""

    def __init__(self, arena: Arena, chunk_size: int, stream: torch.cuda.Stream) -> None:
        self._arena = arena
        self._stream = stream
        self._ring = [
            (torch.empty(chunk_size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
            for _ in range(NUM_STAGING_CHUNKS)
        ]

    def move(self, piece: Piece, reader: Reader) -> None:
        """Read a piece and queue its copy; waits only for the copy that used the same chunk before."""
        staging_B, copied = self._ring[0]
        self._ring.append(self._ring.pop(0))
        copied.synchronize()
        source_B = staging_B[: piece.num_bytes]
        reader.read_into(piece.extent.path, piece.file_offset, source_B.numpy().data)
        target = piece.target(self._arena)
        with torch.cuda.stream(self._stream):
            if piece.extent.is_converted:
                _convert(source_B.to(target.device, non_blocking=True), target, piece.extent)
            else:
                target.copy_(source_B, non_blocking=True)
            copied.record(self._stream)

    def finish(self) -> None:
        """Wait for the copies."""
        self._stream.synchronize()


def make_lanes(arena: Arena, num_lanes: int, chunk_size: int) -> list[Lane]:
    """Lanes into `arena`, one for each thread that reads."""
    if arena.device.type == "cpu":
        return [HostLane(arena, chunk_size) for _ in range(num_lanes)]
    stream = torch.cuda.Stream(arena.device)
    # The arena's memory may still be in use by kernels that were queued before it was allocated.
    stream.wait_stream(torch.cuda.current_stream(arena.device))
    return [DeviceLane(arena, chunk_size, stream) for _ in range(num_lanes)]


def _convert(source_B: Tensor, target: Tensor, extent: Extent) -> None:
    source = source_B.view(extent.source_dtype)
    target.copy_(source)
    narrows = extent.target_dtype == torch.float16
    if narrows and not bool(torch.isfinite(target).all()) and bool(torch.isfinite(source).all()):
        raise UnsupportedModel(
            f"{extent.path}: tensor {extent.name!r} has values beyond float16, whose largest is 65504; "
            "load the model as bfloat16 or float32"
        )
