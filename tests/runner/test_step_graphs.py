"""Captures that fail, and threads that wait for steps meanwhile."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from flashtensors.models.layers import Gate
from flashtensors.runner.buckets import StepShape
from flashtensors.runner.step_graphs import StepGraphs
from flashtensors.runner.workspace import Workspace

SHAPE = StepShape(num_rows=4, num_seqs=4, is_decode=True, has_groups=False, draws=True, has_nuclei=False)


class FakeGraph:
    """Counts what happens to it; ending a capture that failed is an error, as on a device."""

    made: list[FakeGraph]

    def __init__(self) -> None:
        self.num_begun = self.num_ended = 0
        self.made.append(self)

    def capture_begin(self, **options: object) -> None:
        self.num_begun += 1

    def capture_end(self) -> None:
        self.num_ended += 1
        raise RuntimeError("the capture failed")


class FakeStream:
    """Notes who waits for it."""

    def __init__(self) -> None:
        self.waited = threading.Event()

    def synchronize(self) -> None:
        self.waited.set()


@pytest.fixture
def graphs_made(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    FakeGraph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(Workspace, "graph_pool", (0, 0))
    return FakeGraph.made


@pytest.fixture
def workspace() -> Workspace:
    space = Workspace(torch.device("cpu"))
    space.stream = FakeStream()  # pyright: ignore[reportAttributeAccessIssue]
    return space


def test_a_shape_whose_graph_has_no_room_goes_on_without(graphs_made: list[FakeGraph], workspace: Workspace) -> None:
    logits = torch.zeros(4, 8)

    def body(shape: StepShape, gate: Gate | None) -> Tensor:
        if graphs_made and graphs_made[-1].num_begun > graphs_made[-1].num_ended:
            raise torch.OutOfMemoryError("no room in a graph")
        return logits

    graphs = StepGraphs(workspace, body, enforce_eager=False)
    assert all(graphs.run(SHAPE, None) is logits for _ in range(5))
    assert [(graph.num_begun, graph.num_ended) for graph in graphs_made] == [(1, 1), (1, 1)]
    assert graphs.num_captures == 0


def test_why_a_capture_failed_is_told(graphs_made: list[FakeGraph], workspace: Workspace) -> None:
    def body(shape: StepShape, gate: Gate | None) -> Tensor:
        if graphs_made:
            raise ValueError("the reason")
        return torch.zeros(1)

    graphs = StepGraphs(workspace, body, enforce_eager=False)
    graphs.run(SHAPE, None)
    with pytest.raises(ValueError, match="the reason"):
        graphs.run(SHAPE, None)


def test_nobody_waits_for_a_stream_that_is_captured(graphs_made: list[FakeGraph], workspace: Workspace) -> None:
    stream = workspace.stream
    assert isinstance(stream, FakeStream)
    waited_early, waiters = [], []

    def body(shape: StepShape, gate: Gate | None) -> Tensor:
        if graphs_made:
            waiters.append(threading.Thread(target=workspace.wait_for_steps))
            waiters[0].start()
            waited_early.append(stream.waited.wait(0.05))
            raise ValueError("seen enough")
        return torch.zeros(1)

    graphs = StepGraphs(workspace, body, enforce_eager=False)
    graphs.run(SHAPE, None)
    with pytest.raises(ValueError, match="enough"):
        graphs.run(SHAPE, None)
    waiters[0].join(10)
    assert waited_early == [False]
    assert stream.waited.is_set()


def test_no_garbage_is_collected_during_a_capture(workspace: Workspace) -> None:
    """A graph that nobody refers to any more would be destroyed in the middle of it."""
    assert gc.isenabled()
    with workspace.capturing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), workspace.capturing():
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with workspace.capturing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
