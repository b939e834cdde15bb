"""How near to the rate of a copy are norms, alone and fused with the residual's addition?

Each row is one (operation, shape) in bf16. The fused operation reads update and residual and writes residual and norm;
norms of heads (qk-norm) read q and k where they lie in the fused projection. Beside it, in the same run: torch's
operations, and FlashInfer where it can be imported. Before timing, each answer is held to fp64.

    python benchmarks/kernels/bench_norm.py [--warps 0 4 8 16] [--persistent 0 2 4 8]        (0: the default)
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
from timing import DTYPE, Call, check, compare, copy_bytes_per_us, num_sets, random

from flashtensors.kernels.norm_kernel import launch_add_rms_norm, launch_rms_norm

EPS = 1e-6
HIDDEN = [(1, 4096), (32, 4096), (512, 4096), (8192, 4096), (8192, 2880), (8192, 5120), (8192, 8192)]
HEADS = [(32, 40, 128), (8192, 40, 128), (8192, 24, 256)]
"""Rows, heads of q and k that are normalised, head dim; 8 heads of v lie beside them."""


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight.double()


def flashinfer_add_norm(update: Tensor, residual: Tensor, weight: Tensor) -> None:
    from flashinfer.norm import fused_add_rmsnorm

    fused_add_rmsnorm(update, residual, weight, EPS)


def flashinfer_norm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    from flashinfer.norm import rmsnorm

    rmsnorm(x, weight, EPS, out=out)


def measure_add_norm(shape: tuple[int, int], copy_rate: float, options: dict[str, Any]) -> dict[str, Any]:
    num_bytes = 4 * shape[0] * shape[1] * DTYPE.itemsize
    weight = random(shape[1])
    sets = [(random(*shape), random(*shape), random(*shape)) for _ in range(num_sets(num_bytes))]
    update, residual, out = (x.clone() for x in sets[0])
    total = update + residual
    launch_add_rms_norm(update, residual, weight, EPS, out=out, **options)
    check("residual", residual, total, 0.0)
    check("add_rms_norm", out, exact_norm(total, weight), 0.02)

    def torch_calls(update: Tensor, residual: Tensor) -> Call:
        return lambda: F.rms_norm(residual.add_(update), weight.shape, weight, EPS)

    return compare(
        [lambda s=s: launch_add_rms_norm(s[0], s[1], weight, EPS, out=s[2], **options) for s in sets],
        num_bytes,
        copy_rate,
        {
            "torch": [torch_calls(update, residual) for update, residual, _ in sets],
            "flashinfer": [lambda s=s: flashinfer_add_norm(s[0], s[1], weight) for s in sets],
        },
    )


def measure_norm(shape: tuple[int, ...], copy_rate: float, options: dict[str, Any]) -> dict[str, Any]:
    num_bytes = 2 * torch.Size(shape).numel() * DTYPE.itemsize
    weight = random(shape[-1])
    if len(shape) == 3:
        inputs = [random(shape[0], shape[1] + 8, shape[2])[:, : shape[1]] for _ in range(num_sets(num_bytes))]
    else:
        inputs = [random(*shape) for _ in range(num_sets(num_bytes))]
    outs = [torch.empty(shape, dtype=DTYPE, device=weight.device) for _ in inputs]
    check("rms_norm", launch_rms_norm(inputs[0], weight, EPS, **options), exact_norm(inputs[0], weight), 0.02)
    pairs = list(zip(inputs, outs, strict=True))
    return compare(
        [lambda p=p: launch_rms_norm(p[0], weight, EPS, out=p[1], **options) for p in pairs],
        num_bytes,
        copy_rate,
        {
            "torch": [lambda p=p: F.rms_norm(p[0], weight.shape, weight, EPS) for p in pairs],
            "flashinfer": [lambda p=p: flashinfer_norm(p[0], weight, p[1]) for p in pairs],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warps", nargs="+", type=int, default=[0])
    parser.add_argument("--persistent", nargs="+", type=int, default=[0], help="programs on each multiprocessor")
    args = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    cases = [("add_rms_norm", shape) for shape in HIDDEN] + [("rms_norm", shape) for shape in (*HIDDEN, *HEADS)]
    rows: list[dict[str, Any]] = []
    for (operation, shape), warps, programs in itertools.product(cases, args.warps, args.persistent):
        options = {"num_warps": warps or None, "programs_per_multiprocessor": programs or None}
        measured = (
            measure_add_norm((shape[0], shape[1]), copy_rate, options)
            if operation == "add_rms_norm"
            else measure_norm(shape, copy_rate, options)
        )
        rows.append({"operation": operation, "shape": shape, "warps": warps, "persistent": programs, **measured})
        print(rows[-1], flush=True)
    report("norm", rows, copy_tb_per_s=round(copy_rate / 1e6, 3))


if __name__ == "__main__":
    main()
