"""An arena whose addresses stay while its memory comes and goes: what lets CUDA graphs survive a swap."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Self

import torch
from torch import Tensor

from ..errors import FlashError
from .arena import Arena
from .device_pool import DevicePool

PART_BYTES = 1024**3
"""What is mapped at a time where bytes arrive meanwhile; a link takes 20 ms for it, a driver 0.2 to 0.4."""


class WeightArena(Arena):
    """A permanent address range for models of one architecture, backed by a pool's handles while one is resident.

    A captured graph holds addresses, and a model's tensors are views of them; both stay valid when the memory is
    unmapped and other memory, with other weights of the same layout, is mapped in its place. To touch them in between
    is an error that ends the process (on a device: its CUDA context), so `unmap` comes after the last kernel or copy.

    A range for KV caches is of the same kind: as long as a cache may ever be, with memory behind its beginning.

    Args:
        pool: Gives the memory.
        num_bytes: Length; the range is rounded up to whole handles.
        signature: Of the models that fit: equal layouts, and equal constants in the kernels' arguments.
    """

    def __init__(self, pool: DevicePool, num_bytes: int, *, signature: Hashable = None) -> None:
        self.num_bytes = num_bytes
        self.device: torch.device = pool.driver.device
        self.signature = signature
        self.captured: dict[Hashable, object] = {}
        """What was captured over these addresses, by whatever key its owner likes; dropped by `close`."""
        self.pool = pool
        """Where its memory comes from, and goes to."""
        self._num_handles = max(1, pool.count_handles(num_bytes))
        self._address = pool.driver.reserve(self._num_handles * pool.handle_bytes)
        self._handles: list[int] = []
        self._handles_per_part = max(1, PART_BYTES // pool.handle_bytes)
        self._mapped_parts: set[int] = set()
        self._bytes_B: Tensor | None = None
        self._is_closed = False

    @property
    def mapped_bytes(self) -> int:
        """Memory that is behind the addresses now, or will be when it is reached, from the first one on."""
        return len(self._handles) * self.pool.handle_bytes

    @property
    def is_mapped(self) -> bool:
        """Whether there is memory behind the addresses."""
        return bool(self._handles)

    @property
    def bytes_B(self) -> Tensor:
        """The whole range as uint8; the same tensor for the arena's whole life, once it has been mapped."""
        assert self._bytes_B is not None, "the arena is closed, or has never been mapped"
        return self._bytes_B

    def map(self, num_bytes: int | None = None, *, in_parts: bool = False) -> None:
        """Put memory behind the addresses; what it holds is undefined. Nothing is copied or waited for.

        Args:
            num_bytes: How much, from the beginning, in whole handles; None: all of the range.
            in_parts: Take all of it now, but put it behind the addresses as `reach` asks for them: a driver takes 13 to
                26 ms for 64 GB, in which copies can be under way.

        Raises:
            CapacityError: The pool has not enough; the arena stays as it was.
        """
        num_handles = self._num_handles if num_bytes is None else self.pool.count_handles(num_bytes)
        assert num_handles <= self._num_handles, f"{num_bytes} bytes leave a range of {self.num_bytes}"
        assert not self._handles, "the arena is mapped"
        handles = self.pool.take(num_handles)
        try:
            self._attach(handles, 1 if in_parts else len(handles) * self.pool.handle_bytes)
        except FlashError:
            self.pool.give_back(handles)
            raise

    def unmap(self) -> None:
        """Give the memory back to the pool; addresses, views and captured graphs stay. Harmless when not mapped.

        Every kernel and copy that uses the arena has ended.
        """
        self.pool.give_back(self.detach())

    def attach(self, handles: list[int]) -> None:
        """Put memory that was taken from the pool behind the addresses, with what it holds.

        Raises:
            FlashError: The device refuses; the handles stay the caller's, and the arena as it was.
        """
        self._attach(handles, len(handles) * self.pool.handle_bytes)

    def _attach(self, handles: list[int], num_bytes: int) -> None:
        """As `attach`, but only the parts of the first `num_bytes` are mapped."""
        assert not self._is_closed, "the arena is closed"
        assert not self._handles, "the arena is mapped"
        if not handles:
            return
        self._handles = handles
        try:
            self.reach(0, num_bytes)
        except FlashError:
            self.detach()
            raise
        if self._bytes_B is None:
            self._bytes_B = self.pool.driver.tensor(self._address, self.num_bytes)

    def reach(self, start: int, end: int) -> None:
        """See `Arena.reach`; one thread at a time calls.

        Raises:
            FlashError: The device refuses; what was mapped stays.
        """
        part_bytes = self._handles_per_part * self.pool.handle_bytes
        for part in range(start // part_bytes, -(-end // part_bytes)):
            if part not in self._mapped_parts:
                self.pool.driver.map(self._address + part * part_bytes, self._part(part), self.pool.handle_bytes)
                self._mapped_parts.add(part)

    def _part(self, part: int) -> list[int]:
        first = part * self._handles_per_part
        return self._handles[first : first + self._handles_per_part]

    def detach(self) -> list[int]:
        """As `unmap`, but the handles, with what they hold, are the caller's to attach again or to give back."""
        handle_bytes = self.pool.handle_bytes
        for part in self._mapped_parts:
            address = self._address + part * self._handles_per_part * handle_bytes
            self.pool.driver.unmap(address, len(self._part(part)), handle_bytes)
        handles, self._handles, self._mapped_parts = self._handles, [], set()
        return handles

    def close(self) -> None:
        """Give memory and addresses back; views of the arena must not be used any more. Closing twice is harmless."""
        if self._is_closed:
            return
        self.unmap()
        self._is_closed = True
        self.captured.clear()
        self._bytes_B = None
        self.pool.driver.free(self._address, self._num_handles * self.pool.handle_bytes)

    @classmethod
    def allocate(cls, num_bytes: int, device: torch.device | str = "cpu") -> Self:
        """Not for this kind of arena: it is made from a pool."""
        raise AssertionError("a WeightArena is made from a DevicePool")
