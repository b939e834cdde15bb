"""The daemon's end of the line to a worker."""

from __future__ import annotations

from typing import Protocol

from ..worker.messages import Command, Event


class WorkerLink(Protocol):
    """A worker that was started, as the supervisor sees it."""

    def send(self, command: Command) -> None:
        """Queue a command, in order; never blocks, and does nothing once the worker is gone."""
        ...

    async def receive(self) -> Event:
        """The next event; raises `WorkerError` when the worker has died."""
        ...

    def kill(self) -> None:
        """End a worker that does not answer; `receive` then raises."""
        ...

    async def close(self) -> None:
        """Wait briefly for the worker to end by itself, then end it; returns when its process is gone."""
        ...
