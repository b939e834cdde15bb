"""Keeps a thread that queues copies from filling the device's queue.

A queue takes about 1,000 copies. Who queues another one waits inside the driver, where whoever launches a kernel for
another model may have to wait behind it.
"""

from __future__ import annotations

from collections import deque

import torch

from .copy_stream import CopyStream

MAX_COPIES = 640
"""Copies that are queued and have not ended; enough to keep the link busy while other threads run."""
GROUP_COPIES = 64
"""Copies between two events to wait for."""


class CopyWindow:
    """Counts copies on their way, and waits outside the driver while there are too many.

    Args:
        stream: Where they are queued.
        max_copies: Most of them.
    """

    def __init__(self, stream: CopyStream, max_copies: int = MAX_COPIES) -> None:
        self._stream = stream
        self._max_copies = max_copies
        self._groups: deque[tuple[torch.cuda.Event, int]] = deque()
        self._num_grouped = 0
        self._num_loose = 0

    def add(self, num_copies: int) -> None:
        """Some copies were queued; returns when more may be."""
        self._num_loose += num_copies
        if self._num_loose < GROUP_COPIES:
            return
        event = self._stream.record()
        if event is not None:
            self._groups.append((event, self._num_loose))
            self._num_grouped += self._num_loose
        self._num_loose = 0
        while self._num_grouped > self._max_copies and len(self._groups) > 1:
            event, num_ended = self._groups.popleft()
            event.synchronize()
            self._num_grouped -= num_ended
