"""How near to the rate of a copy are the matrix products of a decode step, all of a model's in one graph?

A row is one (model, rows): every projection of every layer and the head, each with weights of its own, so that they
come from memory as in a step. Beside ours, in the same run: the same products by cuBLAS, and the weights' bytes at the
rate of a copy. `alone` times one product of each shape, over rotating weights. Before timing, shapes are held to fp64.

    python benchmarks/kernels/bench_linear.py [--models qwen3-0.6b ...] [--rows 1 8 ...]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from record import report, spread
from shapes import SHAPES
from timing import DTYPE, check, copy_bytes_per_us, num_sets, random, replayed_us

from flashtensors.kernels.linear import linear
from flashtensors.models.registry import weight_layout

Product = Callable[[Tensor, Tensor], Tensor]


def product_shapes(name: str) -> list[tuple[int, int]]:
    """Outputs and inputs of a step's products, in order; the head comes last."""
    config = SHAPES[name]
    shapes = [
        (weight.shape[0], weight.shape[1])
        for weight in weight_layout(config).weights
        if len(weight.shape) == 2 and weight.shape[0] != config.vocab_size
    ]
    return [*shapes, (config.vocab_size, config.hidden_size)]


def check_products(shapes: set[tuple[int, int]], num_rows: int) -> None:
    for num_outputs, num_inputs in shapes:
        x, weight = random(num_rows, num_inputs), random(num_outputs, num_inputs) * 0.02
        few = min(num_outputs, 8192)  # fp64 of a head takes long
        expected = x.double() @ weight[:few].double().T
        check(f"{num_outputs}x{num_inputs}", linear(x, weight)[:, :few], expected, 0.02)


def sequence_us(shapes: list[tuple[int, int]], num_rows: int, product: Product) -> dict[str, float]:
    """All products of a step, one after the other."""
    weights = [random(*shape) * 0.02 for shape in shapes]
    inputs = {num_inputs: random(num_rows, num_inputs) for _, num_inputs in shapes}

    def products() -> None:
        for weight in weights:
            product(inputs[weight.shape[1]], weight)

    return spread(replayed_us([products], num_runs=10))


def alone_us(shape: tuple[int, int], num_rows: int, product: Product) -> float:
    x = random(num_rows, shape[1])
    weights = [random(*shape) for _ in range(num_sets(shape[0] * shape[1] * DTYPE.itemsize))]
    return spread(replayed_us([lambda w=weight: product(x, w) for weight in weights]))["median"]


def measure(name: str, num_rows: int, copy_rate: float) -> dict[str, Any]:
    """One row."""
    shapes = product_shapes(name)
    check_products(set(shapes), num_rows)
    floor_us = sum(outputs * inputs for outputs, inputs in shapes) * DTYPE.itemsize / copy_rate
    cublas_us, us = (sequence_us(shapes, num_rows, product) for product in (F.linear, linear))
    alone = {
        f"{shape[0]}x{shape[1]}": {
            "us": alone_us(shape, num_rows, linear),
            "cublas_us": alone_us(shape, num_rows, F.linear),
            "floor_us": round(shape[0] * shape[1] * DTYPE.itemsize / copy_rate, 2),
        }
        for shape in dict.fromkeys(shapes)
    }
    return {
        "model": name,
        "rows": num_rows,
        "us": us,
        "cublas_us": cublas_us,
        "floor_us": round(floor_us, 1),
        "of_copy_rate": round(floor_us / us["median"], 3),
        "times_cublas": round(cublas_us["median"] / us["median"], 3),
        "alone": alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    arguments = parser.parse_args()
    linear(random(1, 64), random(64, 64))
    copy_rate = copy_bytes_per_us()
    rows = []
    for name, num_rows in itertools.product(arguments.models, arguments.rows):
        rows.append(measure(name, num_rows, copy_rate))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    report("linear", rows, copy_tb_per_s=round(copy_rate / 1e6, 3), dtype="bfloat16")


if __name__ == "__main__":
    main()
