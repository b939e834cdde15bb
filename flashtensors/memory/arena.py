"""One contiguous range of bytes, on the host or on a device, that weights or KV caches live in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ..closing import Closing
from ..errors import CapacityError
from .host_mapping import HostMapping

ALIGNMENT = 256
"""Bytes that every tensor's offset is a multiple of: what CUDA's allocator gives, and a few cache lines on a CPU."""


def align(num_bytes: int) -> int:
    """`num_bytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class Arena(Closing):
    """A byte range that its tensors are views of.

    The arena owns the memory together with the views taken from it: `close` gives up the arena's own hold, and the
    memory goes back when the last view is gone. Host memory is anonymous, page-aligned and zero; it is taken from the
    system page by page as it is touched. Device memory is not cleared.
    """

    def __init__(self, bytes_B: Tensor) -> None:
        assert (bytes_B.dtype, bytes_B.dim()) == (torch.uint8, 1), "an arena is made of bytes"
        self._bytes_B: Tensor | None = bytes_B
        self.num_bytes = bytes_B.numel()
        self.device = bytes_B.device

    @classmethod
    def allocate(cls, num_bytes: int, device: torch.device | str = "cpu") -> Self:
        """A new arena of `num_bytes`.

        Raises:
            CapacityError: The host or the device has no room.
        """
        device = torch.device(device)
        try:
            if device.type == "cpu":
                return cls(HostMapping(num_bytes).bytes_B if num_bytes else torch.empty(0, dtype=torch.uint8))
            return cls(torch.empty(num_bytes, dtype=torch.uint8, device=device))
        except (CapacityError, torch.OutOfMemoryError) as error:
            raise CapacityError(
                f"{device} has no room for {num_bytes} bytes: {error}; unload a model, or choose a smaller one"
            ) from error

    @property
    def bytes_B(self) -> Tensor:
        """The whole range as uint8."""
        assert self._bytes_B is not None, "the arena is closed"
        return self._bytes_B

    def host_memory(self) -> memoryview:
        """The whole range of a host arena as a writable buffer that system calls can fill."""
        assert self.device.type == "cpu", f"{self.device} memory is not addressable from the host"
        return self.bytes_B.numpy().data

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that lies at byte `offset`, a multiple of `ALIGNMENT`; nothing is copied."""
        num_bytes = math.prod(shape) * dtype.itemsize
        assert offset % ALIGNMENT == 0, f"offset {offset} is not a multiple of {ALIGNMENT}"
        assert 0 <= offset <= self.num_bytes - num_bytes, (
            f"bytes {offset} to {offset + num_bytes} leave an arena of {self.num_bytes}"
        )
        return self.bytes_B[offset : offset + num_bytes].view(dtype).view(tuple(shape))

    def reach(self, start: int, end: int) -> None:
        """Make sure that there is memory behind these bytes before they are written: nothing to do for most arenas."""

    def write(self, offset: int, source: Tensor) -> None:
        """Copy the elements of `source`, of any device and layout, to byte `offset` in row-major order."""
        self.view(offset, source.shape, source.dtype).copy_(source)

    def close(self) -> None:
        """Give up the memory; views keep it alive until they are gone. Closing twice is harmless."""
        self._bytes_B = None
