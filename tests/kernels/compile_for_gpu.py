"""Compile what launches would run on a GPU of another kind; prints the shared memory of each kernel in bytes.

Run as a process of its own, without Triton's interpreter: `python compile_for_gpu.py 8.9 MULTIPROCESSORS SHARED_BYTES`.
Tensors are on the CPU, which is taken for that GPU: launches choose tiles and Triton compiles, but nothing runs.
"""
# ruff: noqa: E402 (modules take what devices are from `device_traits` as they are imported)

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from flashtensors.kernels import device_traits

CAPABILITY = tuple(map(int, sys.argv[1].split(".")))
NUM_PROCESSORS, SHARED_BYTES = map(int, sys.argv[2:])
HAS_FP8, IS_HOPPER = CAPABILITY >= (8, 9), CAPABILITY == (9, 0)
TRAITS = {
    "runs_triton": True, "has_early_start": CAPABILITY >= (9, 0), "has_fp8": HAS_FP8, "is_hopper": IS_HOPPER,
    "runs_gluon": IS_HOPPER, "num_multiprocessors": NUM_PROCESSORS, "shared_memory_bytes": SHARED_BYTES,
}  # fmt: skip
for name, trait in TRAITS.items():
    setattr(device_traits, name, lambda device, *, trait=trait, **_: trait)

from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork
from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.kernels.fp8_linear_kernel import launch_fp8_linear
from flashtensors.kernels.linear_hopper import launch_linear
from flashtensors.kernels.moe_kernel import launch_moe
from flashtensors.kernels.norm_kernel import launch_add_rms_norm, launch_rms_norm
from flashtensors.kernels.rope import inverse_frequencies, rotation
from flashtensors.kernels.rope_append import KvScales
from flashtensors.kernels.rope_append_kernel import launch_rope_append
from flashtensors.kernels.sampling_launch import launch_sample
from flashtensors.kernels.sampling_rows import SamplingRows

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
found: dict[str, int] = {}


class Driver:
    """As much of a GPU as a launch asks for before it runs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


def compile_launches(case: str, launch: Callable[[], Any]) -> None:
    """Note the kernels that `launch` compiles as those of `case`."""

    def run(kernel: JITFunction[Any], *arguments: Any, warmup: bool = False, **options: Any) -> None:
        compiled = compile_only(kernel, *arguments, warmup=True, **options)
        place = f"{case}: {kernel.__name__}"
        found[place] = max(found.get(place, 0), compiled.metadata.shared)

    compile_only, JITFunction.run = JITFunction.run, run
    try:
        launch()
    except Exception as error:
        error.add_note(f"in {case}")
        raise
    finally:
        JITFunction.run = compile_only


def attend(head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, num_seqs: int, *, is_long: bool = False) -> None:
    work = AttentionWork(
        num_heads=32, num_kv_heads=8, head_dim=head_dim, max_seqs=num_seqs, max_tokens=num_seqs, device="cpu",
        dtype=dtype, kv_dtype=kv_dtype,
    )  # fmt: skip
    starts, lengths = torch.arange(num_seqs + 1, dtype=torch.int32), torch.ones(num_seqs, dtype=torch.int32)
    work.plan(starts, lengths, max_query_tokens=None if is_long else 1, min_query_tokens=17 if is_long else None)
    cache, tables = torch.zeros(2, 8, 16, head_dim, dtype=kv_dtype), torch.zeros(num_seqs, 2, dtype=torch.int32)
    scales = torch.ones(8) if kv_dtype == FP8_DTYPE else None
    q_THD = torch.zeros(num_seqs, 32, head_dim, dtype=dtype)
    ragged_attention(q_THD, cache, cache, tables, work, scale=1.0, k_scales_K=scales, v_scales_K=scales)


def mix(num_rows: int, *, num_experts: int = 8, hidden: int = 2048, inner: int = 1024) -> None:
    one, top_k = torch.zeros(1, dtype=BF16), min(2, num_experts)
    gate_up, down = (one.expand(num_experts, *shape) for shape in ((2 * inner, hidden), (hidden, inner)))
    ids = torch.zeros(num_rows, top_k, dtype=torch.int32)
    launch_moe(torch.zeros(num_rows, hidden, dtype=BF16), gate_up, down, ids, torch.zeros(num_rows, top_k))


def append(head_dim: int, kv_dtype: torch.dtype, *, num_rows: int = 4) -> None:
    qkv, cache = torch.zeros(num_rows, 12 * head_dim, dtype=BF16), torch.zeros(4, 2, 16, head_dim, dtype=kv_dtype)
    turns = rotation(torch.arange(num_rows), inverse_frequencies(head_dim, 1e4), BF16)
    scales = KvScales(k_scale_K=torch.ones(2), v_scale_K=torch.ones(2)) if kv_dtype == FP8_DTYPE else None
    slots, out = torch.zeros(num_rows, dtype=INT64), qkv.new_empty(num_rows, 8, head_dim)
    launch_rope_append(qkv, turns, cache, cache, slots, out, None, None, scales)


def multiply_fp8(num_rows: int, num_inputs: int, num_outputs: int, *, has_blocks: bool = True) -> None:
    blocks = (-(-num_outputs // 128), -(-num_inputs // 128))
    scale = torch.ones(blocks if has_blocks else (num_outputs, 1))
    weight = torch.empty(num_outputs, num_inputs, dtype=FP8_DTYPE)
    launch_fp8_linear(torch.zeros(num_rows, num_inputs, dtype=BF16), weight, scale, None)


def multiply_few(num_rows: int) -> None:
    x, weight = torch.zeros(num_rows, 1024, dtype=BF16), torch.zeros(8192, 1024, dtype=BF16)
    launch_linear(x, weight, None)


def normalise(num_rows: int, hidden: int) -> None:
    x, weight = torch.zeros(num_rows, hidden, dtype=BF16), torch.zeros(hidden, dtype=BF16)
    launch_rms_norm(x, weight, 1e-6)
    launch_add_rms_norm(x, x, weight, 1e-6)


def sample(num_rows: int, vocabulary: int) -> None:
    stop_ids = torch.zeros(num_rows, 1, dtype=torch.int32)
    launch_sample(torch.zeros(num_rows, vocabulary), SamplingRows.greedy(num_rows, "cpu"), stop_ids_SN=stop_ids)


def compile_all() -> None:
    for head_dim in (64, 128, 256):
        # products in float32 take long to compile; all of them where shared memory is least
        has_float32 = head_dim == 64 or SHARED_BYTES < 128 << 10
        for dtype, kv_dtype in ((BF16, BF16), (BF16, FP8_DTYPE), (FP32, FP32))[: 3 if has_float32 else 2]:
            case = f"attention, dim {head_dim}, {dtype} over {kv_dtype}"
            compile_launches(f"{case}, long", lambda d=head_dim, q=dtype, k=kv_dtype: attend(d, q, k, 32, is_long=True))
            compile_launches(f"{case}, 16", lambda d=head_dim, q=dtype, k=kv_dtype: attend(d, q, k, 16))
        for kv_dtype in (BF16, FP8_DTYPE) if HAS_FP8 else (BF16,):
            compile_launches(f"rope, dim {head_dim}, {kv_dtype}", lambda d=head_dim, k=kv_dtype: append(d, k))
    compile_launches("attention, one sequence", lambda: attend(128, FP32, FP32, 1))
    for num_rows in (1, 32, 96, 224, 4096):
        compile_launches(f"mixture, {num_rows} rows", lambda t=num_rows: mix(t))
    compile_launches("mixture, one of each", lambda: mix(1, num_experts=1, hidden=1, inner=1))
    for num_rows, hidden in ((4, 4096), (1, 1)):
        compile_launches(f"norm, {num_rows} rows of {hidden}", lambda t=num_rows, e=hidden: normalise(t, e))
    for num_rows, vocabulary in ((4, 151936), (1, 1)):
        compile_launches(f"sampling, {num_rows} of {vocabulary}", lambda s=num_rows, v=vocabulary: sample(s, v))
    if HAS_FP8:
        for sizes in ((16, 4096, 4096), (256, 4096, 4096), (1, 4096, 1), (1, 1, 1)):
            compile_launches(f"fp8 product {sizes}", lambda sizes=sizes: multiply_fp8(*sizes))
        compile_launches("fp8 product by rows", lambda: multiply_fp8(16, 4096, 4096, has_blocks=False))
    if IS_HOPPER:
        for num_rows in (1, 64):
            compile_launches(f"product of {num_rows} rows", lambda t=num_rows: multiply_few(t))


if __name__ == "__main__":
    driver.set_active(Driver())
    compile_all()
    print(json.dumps(found))
