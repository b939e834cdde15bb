"""Steps as CUDA graphs: captured when a shape comes for the second time, replayed from then on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..memory.device_view import view_device
from ..models.layers import Gate
from .buckets import StepShape
from .workspace import Workspace

StepBody = Callable[[StepShape, Gate | None], Tensor]
"""Queues the kernels of a step, and returns its logits."""


class StepGraphs:
    """The graphs of one runner.

    Logits are not kept from the memory that graphs share, only their place is: of 1,024 sequences they take 300 MB, and
    there are dozens of graphs.

    The first step of a shape runs without a graph: it compiles what is missing, and whoever waits for it does not wait
    for a capture too. A graph holds addresses alone, so it serves whatever lies behind them later. A shape for whose
    graph the device has no room goes on without one.

    Args:
        workspace: Gives stream and memory.
        body: Runs on the workspace's stream.
        enforce_eager: Capture nothing.
    """

    def __init__(self, workspace: Workspace, body: StepBody, *, enforce_eager: bool) -> None:
        self.num_captures = 0
        self._workspace = workspace
        self._body = body
        self._is_eager = enforce_eager or workspace.stream is None
        self._seen: set[StepShape] = set()
        self._too_large: set[StepShape] = set()
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, shape: StepShape, gate: Gate | None) -> Tensor:
        """Queue a step of this shape; the logits are valid until the next one.

        Args:
            shape: Of the step, whose message was sent.
            gate: Where weights are still landing: asked on the way, which no graph can do.
        """
        captured = self._graphs.get(shape)
        if captured is None and gate is None and self._may_capture(shape):
            captured = self._try_capture(shape)
        if captured is None or gate is not None:
            logits = self._body(shape, gate)
            self._seen.add(shape)
            return logits
        graph, logits = captured
        graph.replay()
        return logits

    def close(self) -> None:
        """Drop all graphs; none of them runs."""
        self._graphs.clear()
        self._seen.clear()

    def _may_capture(self, shape: StepShape) -> bool:
        return not self._is_eager and shape in self._seen and shape not in self._too_large

    def _try_capture(self, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """None where there is no room for what the graph computes in."""
        for _ in range(2):
            try:
                captured = self._graphs[shape] = self._capture(shape)
                return captured
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()  # what steps without a graph left is not given to graphs otherwise
        self._too_large.add(shape)
        return None

    def _capture(self, shape: StepShape) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Threads that load other models go on meanwhile: only what this one does is recorded."""
        graph, pool = torch.cuda.CUDAGraph(), self._workspace.graph_pool
        with self._workspace.capturing():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                logits = self._body(shape, None)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # why the body failed tells more than that its capture did
                    graph.capture_end()
                raise
            graph.capture_end()
        self.num_captures += 1
        return graph, _place_of(logits)


def _place_of(tensor: Tensor) -> Tensor:
    """A tensor of the same place, which owns nothing."""
    place = view_device(tensor.data_ptr(), tensor.nbytes, tensor.device)
    return place.view(tensor.dtype).view(tensor.shape)
