"""Counting what runs, and refusing what is new, once the daemon is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from ..errors import CapacityError


class Drain:
    """Lets running requests finish and no new one in."""

    def __init__(self) -> None:
        self.is_draining = False
        self.num_running = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a request for as long as it runs; raises `CapacityError` once draining."""
        if self.is_draining:
            raise CapacityError("the daemon is shutting down and takes no new requests; try again")
        self.num_running += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self.num_running -= 1
            if self.num_running == 0:
                self._is_idle.set()

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self.is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs; False when `timeout_s` seconds were not enough."""
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
