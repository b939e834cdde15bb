"""How kernels bound by memory are timed: replays of a CUDA graph of calls on rotating inputs, beside a copy's rate.

Inputs rotate until they are several times the L2 cache. Those of a decode step are too small for that, up to the most
sets: they stay in the cache, as what the matrix product before them wrote does in a real step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from record import spread
from torch import Tensor

Call = Callable[[], object]

DEVICE = "cuda"
DTYPE = torch.bfloat16
ROTATED_BYTES = 3 * 2**28
MOST_SETS = 32


def num_sets(bytes_per_call: int) -> int:
    """Sets of inputs to rotate over."""
    return max(2, min(MOST_SETS, ROTATED_BYTES // bytes_per_call))


def random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def replayed_us(calls: Sequence[Call], *, num_runs: int = 20) -> list[float]:
    """Time of one of `calls`, which are captured one after the other in one graph; a sample for each replay."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 / len(calls) for begin, end in itertools.pairwise(events)]


def copy_bytes_per_us() -> float:
    """Bytes read and written by a large copy on the device, for each µs, at its best."""
    source = torch.ones(2**29, dtype=DTYPE, device=DEVICE)
    target = torch.empty_like(source)
    # not copy_: in a graph that becomes a memory copy node, which was seen at two thirds of a kernel's rate
    return 2 * source.nbytes / min(replayed_us([lambda: torch.neg(source, out=target)]))


def check(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Stop the benchmark where an answer is further from fp64 than rounding explains."""
    error = float(((actual.double() - expected.double()).abs() / (1 + expected.double().abs())).max())
    if not error <= tolerance:
        raise SystemExit(f"{name}: error {error:.3g} against fp64, above {tolerance:.3g}")


def compare(
    calls: Sequence[Call], num_bytes: int, copy_rate: float, peers: Mapping[str, Sequence[Call]]
) -> dict[str, Any]:
    """Time `calls` and their peers; a peer that does not run leaves its error in the row."""
    us = spread(replayed_us(calls))
    row: dict[str, Any] = {
        "us": us,
        "tb_per_s": round(num_bytes / us["median"] / 1e6, 3),
        "of_copy_rate": round(num_bytes / us["median"] / copy_rate, 3),
    }
    for name, peer_calls in peers.items():
        try:
            peer_us = spread(replayed_us(peer_calls))["median"]
        except (ImportError, AttributeError, TypeError, ValueError, OSError, RuntimeError) as error:
            row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
        else:
            row[f"{name}_us"] = peer_us
            row[f"times_{name}"] = round(peer_us / us["median"], 3)
    return row
