"""Physical memory in large handles, shared by the arenas of all models.

Handles are kept when an arena gives them back: a swap maps them elsewhere, which takes milliseconds for 64 GiB, and
allocates nothing. Small handles would cost more: 64 GiB in handles of 2 MiB take a second to map.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor

from ..closing import Closing
from ..errors import CapacityError

MIN_HANDLE_BYTES = 32 * 1024**2
MAX_HANDLE_BYTES = 128 * 1024**2
_HANDLES_PER_BUDGET = 256


def choose_handle_bytes(budget_bytes: int) -> int:
    """Bytes of one handle: a power of two, so large that few are mapped and so small that little is rounded up.

    A budget of 12 GB gets 32 MiB, of which a model of 0.5 GB needs 16 for its weights; one of 110 GB gets 128 MiB, of
    which 64 GB are mapped in 13 ms (H200).
    """
    exponent = max(0, budget_bytes // _HANDLES_PER_BUDGET).bit_length() - 1
    return min(max(MIN_HANDLE_BYTES, 2 ** max(0, exponent)), MAX_HANDLE_BYTES)


class MemoryDriver(Protocol):
    """Physical memory and address ranges of one device; any thread may call."""

    device: torch.device
    granularity_bytes: int
    """What all sizes and addresses are multiples of."""

    def create(self, num_bytes: int) -> int:
        """Physical memory; raises `CapacityError` where there is none."""
        ...

    def release(self, handle: int) -> None:
        """Give physical memory back once it is mapped nowhere."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """An address range with no memory behind it."""
        ...

    def free(self, address: int, num_bytes: int) -> None:
        """Give an address range back; nothing is mapped there."""
        ...

    def map(self, address: int, handles: list[int], handle_bytes: int) -> None:
        """Put handles behind the range that begins at `address`, one after another."""
        ...

    def unmap(self, address: int, num_handles: int, handle_bytes: int) -> None:
        """Take the memory away from behind a range that nobody uses any more."""
        ...

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """Mapped addresses as bytes."""
        ...


class DevicePool(Closing):
    """Handles of one size, made when they are first needed and then kept. Any number of threads may use it.

    Args:
        driver: Of the device.
        num_bytes: Most memory to take; the pool has the whole handles that fit.
        handle_bytes: Bytes of one handle, a multiple of the driver's granularity; None: `choose_handle_bytes`.
    """

    def __init__(self, driver: MemoryDriver, num_bytes: int, *, handle_bytes: int | None = None) -> None:
        handle_bytes = handle_bytes or choose_handle_bytes(num_bytes)
        assert handle_bytes % driver.granularity_bytes == 0, f"{handle_bytes} is no multiple of the granularity"
        self.driver = driver
        self.handle_bytes = handle_bytes
        self.num_handles = num_bytes // handle_bytes
        self._free: list[int] = []
        self._lent: set[int] = set()
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes that can be taken now."""
        return (self.num_handles - len(self._lent)) * self.handle_bytes

    def round_up(self, num_bytes: int) -> int:
        """`num_bytes` in whole handles."""
        return self.count_handles(num_bytes) * self.handle_bytes

    def count_handles(self, num_bytes: int) -> int:
        """Handles that `num_bytes` need."""
        return -(-num_bytes // self.handle_bytes)

    def take(self, num_handles: int) -> list[int]:
        """Handles of their taker until they are given back.

        Raises:
            CapacityError: The pool, or the device, has not as many; nothing was taken.
        """
        with self._lock:
            num_left = self.num_handles - len(self._lent)
            if num_handles > num_left:
                raise CapacityError(
                    f"{self.driver.device} has {num_left} free handles of {self.handle_bytes} bytes for weights and "
                    f"KV caches, {num_handles} are needed; unload a model"
                )
            while len(self._free) < num_handles:
                self._free.append(self.driver.create(self.handle_bytes))
            taken = self._free[len(self._free) - num_handles :]
            del self._free[len(self._free) - num_handles :]
            self._lent.update(taken)
            return taken

    def give_back(self, handles: list[int]) -> None:
        """Let others have handles that are mapped nowhere any more."""
        with self._lock:
            assert self._lent.issuperset(handles), "handles that were not lent"
            self._lent.difference_update(handles)
            self._free += handles

    def trim(self) -> int:
        """Return memory that nobody has taken to the device, for others; returns how many bytes."""
        with self._lock:
            num_bytes = len(self._free) * self.handle_bytes
            while self._free:
                self.driver.release(self._free.pop())
            return num_bytes

    def close(self) -> None:
        """Return all memory; every arena has given its handles back."""
        assert not self._lent, f"{len(self._lent)} handles are still mapped"
        self.trim()
