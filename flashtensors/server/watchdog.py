"""Notices a worker that lives but does not answer, which no exit code tells."""

from __future__ import annotations

import asyncio
import time

from ..errors import WorkerError
from ..worker.messages import Ping
from .worker_link import WorkerLink

GPU_TIMEOUT_S = 60.0
CPU_TIMEOUT_S = 900.0
"""One step over a long prompt of a large model may take minutes on a CPU."""
START_TIMEOUT_S = 600.0
"""How long a worker may take until its first message."""


class Watchdog:
    """Pings one worker while it is silent, and kills it when it stays silent.

    Args:
        link: The line to the worker.
        timeout_s: Silence that is too long; None: by the device.
    """

    def __init__(self, link: WorkerLink, timeout_s: float | None) -> None:
        self.error: WorkerError | None = None
        """Why the worker was killed."""
        self._link = link
        self._timeout_s = timeout_s
        self._heard_s = time.monotonic()
        self._ready = asyncio.Event()

    def hear(self) -> None:
        """The worker has said something."""
        self._heard_s = time.monotonic()

    def hear_ready(self, device: str) -> None:
        """The worker is ready, and computes on `device`."""
        if self._timeout_s is None:
            self._timeout_s = CPU_TIMEOUT_S if device == "cpu" else GPU_TIMEOUT_S
        self._ready.set()

    async def watch(self) -> None:
        """Run until the worker was killed; cancel it when the worker is gone."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._ready.wait()
        except TimeoutError:
            self._end(f"the worker was not ready after {START_TIMEOUT_S:.0f} s")
            return
        timeout_s = self._timeout_s
        assert timeout_s is not None, "known since the worker was ready"
        await asyncio.sleep(timeout_s / 4)
        while (silent_s := time.monotonic() - self._heard_s) <= timeout_s:
            self._link.send(Ping())
            await asyncio.sleep(timeout_s / 4)
        self._end(f"the worker has not answered for {silent_s:.0f} s (worker_timeout_s is {timeout_s:g})")

    def _end(self, why: str) -> None:
        self.error = WorkerError(f"{why}, so it was ended; it is started again")
        self._link.kill()
