"""What the runners of one device share, because their steps never overlap."""

from __future__ import annotations

import gc
import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..kernels.attention.work import AttentionWork


class Workspace:
    """Stream, graph memory and buffers of one device; one for each worker, and it outlives every runner over it.

    Graphs hold addresses of what is in here, so nothing is given back before `close`. One thread runs steps; others may
    make runners, and wait for steps.

    Args:
        device: Where the steps of all runners run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Every step runs here; None on a CPU."""
        self.capture_lock = threading.Lock()
        """Held while a graph is captured."""
        self._graph_pool: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None
        self._works: dict[Hashable, AttentionWork] = {}

    @property
    def graph_pool(self) -> Any:
        """Where activations of all graphs lie: each may overwrite what another left, as they replay in turn.

        A pool goes when its last graph does, so a graph of nothing holds it.
        """
        if self._anchor is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
            anchor = torch.cuda.CUDAGraph()
            with self.capturing(), self.on_stream():
                anchor.capture_begin(pool=self._graph_pool, capture_error_mode="thread_local")
                torch.zeros(1, device=self.device)
                anchor.capture_end()
            self._anchor = anchor
        return self._graph_pool

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture a graph in here: nobody waits for the stream, and no old graph is destroyed, which would break it.

        One that nobody refers to any more is destroyed by whichever thread collects garbage, so none is collected.
        """
        with self.capture_lock:
            collects = gc.isenabled()
            gc.disable()
            try:
                yield
            finally:
                if collects:
                    gc.enable()

    def on_stream(self) -> AbstractContextManager[object]:
        """Make `stream` the current one; on a CPU nothing happens."""
        return torch.cuda.stream(self.stream)

    def wait_for_steps(self) -> None:
        """Wait until no kernel of a step is under way; any thread may call.

        To wait for a stream that is being captured is an error for both, so this comes after the capture.
        """
        if self.stream is not None:
            with self.capture_lock:
                self.stream.synchronize()

    def attention_work(self, **shape: Any) -> AttentionWork:
        """The attention work of a shape and window, made on first use; arguments as for `AttentionWork`."""
        from ..kernels.attention.work import AttentionWork

        key = tuple(sorted(shape.items(), key=lambda item: item[0]))
        if key not in self._works:
            self._works[key] = AttentionWork(**shape, device=self.device)
        return self._works[key]

    def close(self) -> None:
        """Drop what is shared; every runner is closed."""
        self._works.clear()
        self._anchor = self._graph_pool = None
