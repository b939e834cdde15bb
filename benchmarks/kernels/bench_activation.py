"""How near to the rate of a copy are gated activations?

Each row is one (activation, shape) in bf16: rows of gate and up are read, their product is written. Beside it, in the
same run: torch's two operations, and FlashInfer where it can be imported. Before timing, each answer is held to fp64.

    python benchmarks/kernels/bench_activation.py [--blocks 1024 2048] [--warps 4 8]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report
from timing import DTYPE, check, compare, copy_bytes_per_us, num_sets, random

from flashtensors.kernels.activation_kernel import launch_gated_product

SHAPES = [(1, 14336), (16, 14336), (512, 14336), (8192, 14336), (8192, 9728), (8192, 1536)]


def gated_in_torch(gate_up: Tensor, is_gelu: bool) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)) * up


def gated_in_flashinfer(gate_up: Tensor, out: Tensor, is_gelu: bool) -> None:
    from flashinfer.activation import gelu_tanh_and_mul, silu_and_mul

    (gelu_tanh_and_mul if is_gelu else silu_and_mul)(gate_up, out)


def measure(shape: tuple[int, int], is_gelu: bool, copy_rate: float, options: dict[str, int]) -> dict[str, Any]:
    num_bytes = 3 * shape[0] * shape[1] * DTYPE.itemsize
    sets = [(random(shape[0], 2 * shape[1]), torch.empty_like(random(*shape))) for _ in range(num_sets(num_bytes))]
    gate_up = sets[0][0]
    some = gate_up[: 2**24 // shape[1]]
    answer = launch_gated_product(gate_up, is_gelu=is_gelu, **options)[: len(some)]
    check("gated product", answer, gated_in_torch(some.double(), is_gelu), 0.01)
    return compare(
        [lambda s=s: launch_gated_product(s[0], is_gelu=is_gelu, out=s[1], **options) for s in sets],
        num_bytes,
        copy_rate,
        {
            "torch": [lambda s=s: gated_in_torch(s[0], is_gelu) for s in sets],
            "flashinfer": [lambda s=s: gated_in_flashinfer(s[0], s[1], is_gelu) for s in sets],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1024], help="elements of gate of a program")
    parser.add_argument("--warps", nargs="+", type=int, default=[4])
    args = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    rows: list[dict[str, Any]] = []
    for is_gelu, shape, block, warps in itertools.product((False, True), SHAPES, args.blocks, args.warps):
        measured = measure(shape, is_gelu, copy_rate, {"block": block, "num_warps": warps})
        name = "gelu_tanh_mul" if is_gelu else "silu_mul"
        rows.append({"operation": name, "shape": shape, "block": block, "warps": warps, **measured})
        print(rows[-1], flush=True)
    report("activation", rows, copy_tb_per_s=round(copy_rate / 1e6, 3))


if __name__ == "__main__":
    main()
