"""Runs of a benchmark that count only once nothing is made in them any more: no CUDA graph, no kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

MAX_WARM_UPS = 6

Row = dict[str, Any]
"""What a run measured."""


@dataclass
class NewWork:
    """What was made since `watch_new_work` began."""

    num_captures: int = 0
    """CUDA graphs."""
    kernels: list[str] = field(default_factory=list)
    """Names of Triton kernels that were compiled, or read from disk, for arguments that this process had not seen."""


@contextlib.contextmanager
def watch_new_work() -> Iterator[NewWork]:
    """Count captures and compilations of all threads of this process."""
    from triton import knobs

    work, begin_capture = NewWork(), torch.cuda.CUDAGraph.capture_begin

    def capture_begin(graph: torch.cuda.CUDAGraph, *args: Any, **kwargs: Any) -> None:
        work.num_captures += 1
        begin_capture(graph, *args, **kwargs)

    def after_compile(**about: Any) -> None:
        work.kernels.append(about["fn"].name)

    with (
        mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", capture_begin),
        mock.patch.object(knobs.runtime, "jit_post_compile_hook", after_compile),
    ):
        yield work


def warm_runs(
    run: Callable[[NewWork], Row], num_runs: int, *, are_alike: bool = True, most_captures: int = 0
) -> tuple[list[Row], list[Row]]:
    """Run until as many whole runs as asked for made nothing new.

    Args:
        run: Gives everything once and measures it; told what is made meanwhile.
        num_runs: Runs that count.
        are_alike: Every run takes the same steps, so that none may make anything after one that did not. Otherwise
            such a run does not count.
        most_captures: Graphs that a run may capture and still count.

    Returns:
        The runs that do not count, and those that do; each row also says how many graphs and kernels were made.

    Raises:
        RuntimeError: A run captured or compiled after one that did not, or more than `MAX_WARM_UPS` did.
    """
    warm_ups: list[Row] = []
    measured: list[Row] = []
    while len(measured) < num_runs:
        with watch_new_work() as work:
            row = run(work)
        row |= {"captures": work.num_captures, "compiles": len(work.kernels)}
        is_warm = work.num_captures <= most_captures and not work.kernels
        is_late = bool(measured) and are_alike
        if not is_warm and (is_late or len(warm_ups) == MAX_WARM_UPS):
            when = "after a run that made nothing new" if is_late else f"after {MAX_WARM_UPS} runs that warmed up"
            raise RuntimeError(
                f"{when}, a run captured {work.num_captures} graphs and compiled {sorted(set(work.kernels))}: {row}"
            )
        (measured if is_warm else warm_ups).append(row)
    return warm_ups, measured
