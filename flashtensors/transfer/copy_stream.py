"""Where copies are queued: a CUDA stream of their own, or nothing at all on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch


class CopyStream(Protocol):
    """Copies in order, beside what the device computes."""

    has_events: bool
    """Whether who computes can wait for a copy on the device."""

    def use(self) -> AbstractContextManager[object]:
        """Queue this thread's copies here while the block lasts."""
        ...

    def record(self) -> torch.cuda.Event | None:
        """An event behind all copies that were queued so far; None where they have ended."""
        ...

    def synchronize(self) -> None:
        """Wait until every copy has ended."""
        ...


class CudaCopyStream:
    """A stream that begins after what the caller's stream has queued so far.

    The arena's memory may still be in use by kernels that were queued before it was allocated.
    """

    has_events = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def use(self) -> AbstractContextManager[object]:
        """Queue this thread's copies here while the block lasts."""
        return torch.cuda.stream(self._stream)

    def record(self) -> torch.cuda.Event:
        """An event behind all copies that were queued so far; threads that wait for it sleep."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        """Wait until every copy has ended."""
        self._stream.synchronize()


class HostCopyStream:
    """Copies on a CPU have ended when their call returns."""

    has_events = False

    def use(self) -> AbstractContextManager[object]:
        """Nothing to set up."""
        return nullcontext()

    def record(self) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def make_copy_stream(device: torch.device) -> CopyStream:
    """A stream for copies to `device`."""
    return HostCopyStream() if device.type == "cpu" else CudaCopyStream(device)
