"""Benchmarks measure only runs in which no graph is captured and no kernel compiled."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.engine.warm_runs import MAX_WARM_UPS, NewWork, Row, warm_runs, watch_new_work


class Runs:
    """Runs that make as many graphs and kernels, one run after the other."""

    def __init__(self, *made: tuple[int, int]) -> None:
        self._made = iter(made)
        self._number = 0

    def __call__(self, work: NewWork) -> Row:
        num_captures, num_kernels = next(self._made, (0, 0))
        work.num_captures += num_captures
        work.kernels += ["attend_kernel"] * num_kernels
        self._number += 1
        return {"number": self._number}


def numbers(rows: list[Row]) -> list[int]:
    return [row["number"] for row in rows]


def test_runs_count_from_the_first_that_makes_nothing():
    warm_ups, measured = warm_runs(Runs((48, 30), (7, 0), (0, 1)), 3)
    assert [(row["captures"], row["compiles"]) for row in warm_ups] == [(48, 30), (7, 0), (0, 1)]
    assert numbers(measured) == [4, 5, 6]
    assert all((row["captures"], row["compiles"]) == (0, 0) for row in measured)


@pytest.mark.parametrize("late", [(1, 0), (0, 1)])
def test_a_run_that_makes_something_after_a_warm_one_is_an_error(late: tuple[int, int]):
    with pytest.raises(RuntimeError, match="after a run that made nothing new"):
        warm_runs(Runs((0, 0), late), 3)


def test_runs_that_are_not_alike_count_where_they_make_nothing():
    warm_ups, measured = warm_runs(Runs((9, 0), (0, 0), (1, 0), (0, 0)), 2, are_alike=False)
    assert (numbers(warm_ups), numbers(measured)) == ([1, 3], [2, 4])
    with pytest.raises(RuntimeError, match=f"after {MAX_WARM_UPS} runs"):
        warm_runs(Runs((0, 0), *[(1, 0)] * (MAX_WARM_UPS + 1)), 2, are_alike=False)


def test_runs_that_never_get_warm_are_an_error_that_names_kernels():
    runs = Runs(*[(0, 1)] * (MAX_WARM_UPS + 1))
    with pytest.raises(RuntimeError, match=rf"after {MAX_WARM_UPS} runs .*attend_kernel"):
        warm_runs(runs, 1)
    assert numbers(warm_runs(Runs(*[(0, 1)] * MAX_WARM_UPS), 1)[1]) == [MAX_WARM_UPS + 1]


@pytest.mark.gpu
def test_graphs_and_kernels_are_seen():
    import triton

    @triton.jit
    def nothing_kernel(size):
        pass

    with watch_new_work() as work:
        nothing_kernel[(1,)](8)
        nothing_kernel[(1,)](8)
        graph, ones = torch.cuda.CUDAGraph(), torch.ones(8, device="cuda")
        with torch.cuda.graph(graph):
            ones += 1
    assert work.num_captures == 1
    assert [name.rpartition(".")[2] for name in work.kernels] == ["nothing_kernel"]
    with watch_new_work() as work:
        nothing_kernel[(1,)](8)
        graph.replay()
    assert (work.num_captures, work.kernels) == (0, [])
