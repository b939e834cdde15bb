"""How much quicker are products with weights in fp8 than cuBLAS with bf16 ones, all of a model's layers in one graph?

A row is one (model, scales, rows): every projection of every layer, each with weights of its own, so that they come
from memory as in a step; rounding the rows to fp8 is part of the time. `floor_us` is the fp8 weights' bytes at the rate
of a copy. Before timing, each shape is held to fp64 of the same rounded rows.

    python benchmarks/kernels/bench_fp8_linear.py [--models qwen3-8b ...] [--rows 8 64 256 ...]
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
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from record import report, spread
from shapes import SHAPES, with_fp8_weights
from timing import DEVICE, DTYPE, check, copy_bytes_per_us, random, replayed_us

from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.kernels.fp8_linear import BLOCK, dequantize, fp8_linear, round_rows
from flashtensors.models.registry import weight_layout

Weight = tuple[Tensor, Tensor]


def make_weight(num_outputs: int, num_inputs: int, *, has_blocks: bool) -> Weight:
    """Random values, and scales that make them as large as weights are."""
    shape = (num_outputs // BLOCK, num_inputs // BLOCK) if has_blocks else (num_outputs, 1)
    values = torch.randn(num_outputs, num_inputs, device=DEVICE).mul_(60).to(FP8_DTYPE)
    return values, torch.rand(shape, device=DEVICE).add_(0.5).mul_(0.02 / 60)


def check_product(num_rows: int, weight: Weight) -> None:
    values, scale = weight
    x = random(num_rows, values.shape[1])
    rounded, x_scale = round_rows(x)
    expected = (rounded.double() * x_scale.double()) @ dequantize(values, scale, torch.float64).T
    # matrix units keep some 14 bits of a sum of fp8 products, and sums of 12,288 reach ten
    check(f"{tuple(values.shape)} of {num_rows} rows", fp8_linear(x, values, scale), expected, 0.06)


def measure(name: str, num_rows: int, copy_rate: float, *, has_blocks: bool) -> dict[str, Any]:
    """One row."""
    layout = weight_layout(with_fp8_weights(SHAPES[name])).weights
    shapes = [weight.shape for weight in layout if weight.dtype == "float8_e4m3fn"]
    weights = [make_weight(*shape, has_blocks=has_blocks) for shape in shapes]
    for weight in {tuple(weight[0].shape): weight for weight in weights}.values():
        check_product(num_rows, weight)
    inputs = {num_inputs: random(num_rows, num_inputs) for _, num_inputs in shapes}

    def in_fp8() -> None:
        for values, scale in weights:
            fp8_linear(inputs[values.shape[1]], values, scale)

    us = spread(replayed_us([in_fp8], num_runs=10))
    wide = [random(*shape).mul_(0.02) for shape in shapes]

    def in_bf16() -> None:
        for weight in wide:
            F.linear(inputs[weight.shape[1]], weight)

    bf16_us = spread(replayed_us([in_bf16], num_runs=10))
    floor_us = sum(values.nbytes + scale.nbytes for values, scale in weights) / copy_rate
    return {
        "model": name,
        "scales": "blocks" if has_blocks else "rows",
        "rows": num_rows,
        "us": us,
        "floor_us": round(floor_us, 1),
        "cublas_bf16_us": bf16_us,
        "times_cublas_bf16": round(bf16_us["median"] / us["median"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "qwen3-8b"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 64, 128, 256, 2048])
    arguments = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    rows = []
    for name, has_blocks, num_rows in itertools.product(arguments.models, (False, True), arguments.rows):
        rows.append(measure(name, num_rows, copy_rate, has_blocks=has_blocks))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    report("fp8-linear", rows, copy_tb_per_s=round(copy_rate / 1e6, 3), dtype=str(DTYPE).removeprefix("torch."))


if __name__ == "__main__":
    main()
