"""How near to the bytes of its weights, or to the matrix units, is a mixture of experts on one GPU?

One layer of Qwen3-30B-A3B and of Mixtral 8x7B in bf16, with random experts for each row. The limit is the longer of
two times measured in the same run: reading the weights of the experts that were chosen at the rate of a copy, and
multiplying at the rate of a large matrix product. Beside it, in torch: a loop over experts, which waits for the device,
and the same sort with torch's grouped product. Every timing but the loop's replays a CUDA graph of calls with other
rows and experts each, so that caches do not help.

    python benchmarks/kernels/bench_moe.py [--models qwen3_30b_a3b mixtral_8x7b] [--rows 1 16 256 4096]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread
from timing import replayed_us

from flashtensors.kernels.moe import moe, moe_reference
from flashtensors.kernels.moe_routing import Routing, route

DTYPE = torch.bfloat16
NUM_SETS = 6


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    num_experts: int
    top_k: int
    hidden: int
    inner: int


SHAPES = {"qwen3_30b_a3b": Shape(128, 8, 2048, 768), "mixtral_8x7b": Shape(8, 2, 4096, 14336)}


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, and sets of rows with their experts."""

    shape: Shape
    gate_up: Tensor
    down: Tensor

    @classmethod
    def random(cls, shape: Shape) -> Layer:
        """Weights that keep the size of what passes through."""
        options: dict[str, Any] = {"dtype": DTYPE, "device": "cuda"}
        gate_up = torch.randn(shape.num_experts, 2 * shape.inner, shape.hidden, **options).mul_(shape.hidden**-0.5)
        down = torch.randn(shape.num_experts, shape.hidden, shape.inner, **options).mul_(shape.inner**-0.5)
        return cls(shape, gate_up, down)

    def rows(self, num_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, their experts and the experts' weights."""
        random = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(num_rows, self.shape.hidden, dtype=DTYPE, device="cuda", generator=random)
        logits = torch.randn(num_rows, self.shape.num_experts, dtype=DTYPE, device="cuda", generator=random)
        return x, *route(logits, Routing(num_experts_per_token=self.shape.top_k))


def torch_loop(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A product for each expert that has rows."""
    out = torch.zeros_like(x)
    for expert in torch.unique(ids).tolist():
        rows, places = torch.where(ids == expert)
        gate, up = F.linear(x[rows], gate_up[expert]).chunk(2, -1)
        update = F.linear(F.silu(gate) * up, down[expert]) * weights[rows, places, None].to(x.dtype)
        out.index_add_(0, rows, update)
    return out


def torch_grouped(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sort, torch's grouped product, SwiGLU, torch's grouped product, weighted sum."""
    flat = ids.flatten().long()
    order = flat.argsort()
    ends = torch.zeros(gate_up.shape[0], dtype=torch.int64, device=x.device)
    ends = ends.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).int()
    gate, up = torch._grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    updates = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    placed = torch.empty_like(updates).index_copy_(0, order, updates).unflatten(0, ids.shape)
    return (placed * weights[..., None]).sum(1).to(x.dtype)


def elapsed_us(call: Callable[[], object], num_runs: int) -> list[float]:
    """Time of each of `num_runs` calls."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_runs + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in itertools.pairwise(events)]


def copy_bytes_per_us() -> float:
    """Rate of a copy from device to device, read and written bytes counted."""
    source = torch.zeros(2**32, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    return 2 * source.nbytes / min(elapsed_us(lambda: target.copy_(source), 8))


def flops_per_us() -> float:
    size = 8192
    left, right = (torch.randn(size, size, dtype=DTYPE, device="cuda") for _ in range(2))
    return 2 * size**3 / spread(replayed_us([lambda: left @ right]))["median"]


def check(layer: Layer, operands: tuple[Tensor, ...], out: Tensor) -> float:
    """Largest error of some rows against fp64, relative to the largest element; raises where it is too large."""
    x, ids, weights = operands
    some = slice(0, 4)
    used, local_ids = torch.unique(ids[some], return_inverse=True)
    expected = moe_reference(
        x[some].double(), layer.gate_up[used].double(), layer.down[used].double(), local_ids, weights[some].double()
    )
    error = float((out[some].double() - expected).abs().max() / expected.abs().max())
    if not error < 0.01:
        raise SystemExit(f"{len(x)} rows: error {error:.3g} against fp64")
    return error


def measure(name: str, layer: Layer, num_rows: int, copy_rate: float, flop_rate: float) -> dict[str, Any]:
    shape = layer.shape
    sets = [layer.rows(num_rows, seed) for seed in range(NUM_SETS)]
    error = check(layer, sets[0], moe(sets[0][0], layer.gate_up, layer.down, *sets[0][1:]))

    def timed(function: Callable[..., Tensor]) -> list[float]:
        return replayed_us([lambda s=s: function(s[0], layer.gate_up, layer.down, *s[1:]) for s in sets])

    samples = spread(timed(moe))
    loop_sets = iter(sets * 3)

    def loop() -> Tensor:
        x, ids, weights = next(loop_sets)
        return torch_loop(x, layer.gate_up, layer.down, ids, weights)

    loop()
    loop_us = spread(elapsed_us(loop, 5))["median"]
    grouped_us = spread(timed(torch_grouped))["median"]
    logits = [torch.randn(num_rows, shape.num_experts, dtype=DTYPE, device="cuda") for _ in range(16)]
    routing = Routing(num_experts_per_token=shape.top_k)
    route_us = spread(replayed_us([lambda row=row: route(row, routing) for row in logits]))["median"]
    num_active = sum(len(torch.unique(ids)) for _, ids, _ in sets) / len(sets)
    expert_elements = 3 * shape.hidden * shape.inner
    bytes_us = num_active * expert_elements * 2 / copy_rate
    flops_us = 2 * num_rows * shape.top_k * expert_elements / flop_rate
    limit_us = max(bytes_us, flops_us)
    return {
        "model": name,
        "rows": num_rows,
        "active_experts": round(num_active, 1),
        "us": samples,
        "route_us": route_us,
        "limit_us": round(limit_us, 1),
        "limit": "weight bytes" if bytes_us > flops_us else "matrix units",
        "of_limit": round(limit_us / samples["median"], 3),
        "tflop_per_s": round(2e-6 * num_rows * shape.top_k * expert_elements / samples["median"], 1),
        "torch_loop_us": loop_us,
        "torch_grouped_us": grouped_us,
        "times_torch_grouped": round(grouped_us / samples["median"], 2),
        "error": round(error, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256, 4096])
    args = parser.parse_args()
    copy_rate, flop_rate = copy_bytes_per_us(), flops_per_us()
    rows = []
    for name in args.models:
        layer = Layer.random(SHAPES[name])
        for num_rows in args.rows:
            rows.append(measure(name, layer, num_rows, copy_rate, flop_rate))
            print(rows[-1], flush=True)
        del layer
    report("moe", rows, copy_tb_per_s=round(copy_rate / 1e6, 2), matmul_tflop_per_s=round(flop_rate / 1e6, 1))


if __name__ == "__main__":
    main()
