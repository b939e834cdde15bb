"""Triton bodies of `fp8_linear.py`, and which product goes where.

A program of the product takes `BLOCK_O` rows of the weight and `BLOCK_T` rows of x: the weight is the left side of the
matrix units, so few rows waste few of them. Where tiles of outputs do not fill the device, programs share a tile's
inputs (split-K) and leave fp32 sums, which another kernel adds up in a fixed order. All kernels are placed before the
kernel in front has ended, and wait for it on the device.

Shapes: T rows, I inputs, O outputs, Z splits.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_traits import has_early_start, num_multiprocessors
from .fp8 import FP8_DTYPE, FP8_MAX
from .fp8_linear import BLOCK, MIN_SCALE

FEW_ROWS = 64
"""Most rows for which the kernel here was seen to be quicker than `torch._scaled_mm`, which takes row scales only."""
_SUM_ELEMENTS = 1024
"""Outputs of one program that adds up splits."""


class Tiling(NamedTuple):
    """How a product is cut."""

    block_outputs: int
    block_rows: int
    block_inputs: int
    num_splits: int
    num_warps: int
    num_stages: int


@triton.jit
def _multiply(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    split_inputs,
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    """Tile `[BLOCK_T, BLOCK_O]` of `out [T, O]`, or of `out [Z, T, O]` in fp32 from a part of the inputs."""
    outputs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    columns = tl.arange(0, BLOCK_I)
    is_output, is_row = outputs < num_outputs, rows < num_rows
    first_input = split * split_inputs
    num_here = tl.minimum(split_inputs, num_inputs - first_input)
    weight_at = weight_ptr + outputs.to(tl.int64)[:, None] * num_inputs + first_input + columns[None, :]
    x_at = x_ptr + rows.to(tl.int64)[None, :] * num_inputs + first_input + columns[:, None]
    scale_at = scale_ptr + outputs // SCALE_BLOCK * tl.cdiv(num_inputs, SCALE_BLOCK)
    if HAS_EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((BLOCK_O, BLOCK_T), dtype=tl.float32)
    for start in range(0, num_here, BLOCK_I):
        if IS_EVEN:
            weight = tl.load(weight_at + start, mask=is_output[:, None], other=0.0)
            x = tl.load(x_at + start, mask=is_row[None, :], other=0.0)
        else:
            is_input = start + columns < num_here
            weight = tl.load(weight_at + start, mask=is_output[:, None] & is_input[None, :], other=0.0)
            x = tl.load(x_at + start, mask=is_row[None, :] & is_input[:, None], other=0.0)
        if HAS_BLOCKS:
            scale = tl.load(scale_at + (first_input + start) // SCALE_BLOCK, mask=is_output, other=0.0)
            sums += tl.dot(weight, x) * scale[:, None]
        else:
            sums = tl.dot(weight, x, sums)
    if not HAS_BLOCKS:
        sums *= tl.load(scale_ptr + outputs, mask=is_output, other=0.0)[:, None]
    sums *= tl.load(x_scale_ptr + rows, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]
    places = rows.to(tl.int64)[None, :] * num_outputs + outputs[:, None]
    if IS_SPLIT:
        places += split.to(tl.int64) * num_rows * num_outputs
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit
def _add_splits(
    sums_ptr,
    bias_ptr,
    out_ptr,
    num_elements,
    num_outputs,
    NUM_SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    """`out [T, O]` from `sums [Z, T, O]`, one split after the other."""
    places = tl.program_id(0).to(tl.int64) * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)
    is_element = places < num_elements
    if HAS_EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    stride = tl.cast(num_elements, tl.int64)  # a 1 is a constant, and has no `to`
    total = tl.zeros((BLOCK_ELEMENTS,), dtype=tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(sums_ptr + places + stride * split, mask=is_element, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + places % num_outputs, mask=is_element, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=is_element)


@triton.jit
def _round_rows(
    x_ptr,
    x_row_stride,
    rounded_ptr,
    scale_ptr,
    num_inputs,
    LARGEST: tl.constexpr,
    LEAST_SCALE: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    """A row of x in fp8, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_INPUTS)
    is_input = columns < num_inputs
    if HAS_EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_row_stride + columns, mask=is_input, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)) / LARGEST, LEAST_SCALE)
    rounded = tl.clamp(x / scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(rounded_ptr + row * num_inputs + columns, rounded.to(rounded_ptr.dtype.element_ty), mask=is_input)
    tl.store(scale_ptr + row, scale)


def launch_fp8_linear(x_TI: Tensor, weight_OI: Tensor, scale: Tensor, bias_O: Tensor | None) -> Tensor:
    """`fp8_linear` on a device with fp8 arithmetic; the arguments were checked."""
    num_rows, num_inputs = x_TI.shape
    num_outputs = weight_OI.shape[0]
    if num_rows == 0:
        return x_TI.new_empty(0, num_outputs)
    rounded_TI, x_scale_T1 = launch_round_rows(x_TI)
    has_row_scales = scale.shape == (num_outputs, 1)
    is_aligned = num_inputs % 16 == 0 and num_outputs % 16 == 0
    if num_rows > FEW_ROWS and has_row_scales and is_aligned and x_TI.dtype == torch.bfloat16:
        return torch._scaled_mm(
            rounded_TI,
            weight_OI.t(),
            scale_a=x_scale_T1,
            scale_b=scale.t(),
            bias=bias_O,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    num_processors = num_multiprocessors(x_TI.device)
    tiling = choose_tiling(num_rows, num_inputs, num_outputs, num_processors, has_row_scales=has_row_scales)
    return launch_multiply(rounded_TI, x_scale_T1, weight_OI, scale, bias_O, x_TI.dtype, tiling)


def choose_tiling(
    num_rows: int, num_inputs: int, num_outputs: int, num_processors: int, *, has_row_scales: bool
) -> Tiling:
    """How to cut a product, as measured on an H200 over the shapes of 0.6B and 8B parameters and 8 to 256 rows."""
    block_rows = min(128, max(16, triton.next_power_of_2(num_rows)))
    block_inputs, num_stages = (256, 4) if has_row_scales and block_rows <= 32 else (BLOCK, 6)
    block_outputs, num_warps = 64, 4
    if block_rows == 128:
        block_outputs, num_warps, num_stages = 128, 8, 4
    enough = num_processors if block_rows > 32 else num_processors * 3 // 4
    num_programs = triton.cdiv(num_outputs, block_outputs) * triton.cdiv(num_rows, block_rows)
    num_splits = 1
    while num_programs < enough:
        least_inputs = 512 if 4 * num_programs <= num_processors else 1024
        if num_inputs < 2 * num_splits * least_inputs:
            break
        num_splits, num_programs = 2 * num_splits, 2 * num_programs
    return Tiling(block_outputs, block_rows, block_inputs, num_splits, num_warps, num_stages)


def launch_multiply(
    rounded_TI: Tensor,
    x_scale_T1: Tensor,
    weight_OI: Tensor,
    scale: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """The product `[T, O]` in `dtype` of rows that `launch_round_rows` made."""
    (num_rows, num_inputs), num_outputs = rounded_TI.shape, weight_OI.shape[0]
    num_splits, is_split = tiling.num_splits, tiling.num_splits > 1
    starts_early = has_early_start(rounded_TI.device)
    out_TO = torch.empty((num_rows, num_outputs), dtype=dtype, device=rounded_TI.device)
    sums = out_TO.new_empty((num_splits, num_rows, num_outputs), dtype=torch.float32) if is_split else out_TO
    grid = (triton.cdiv(num_outputs, tiling.block_outputs), triton.cdiv(num_rows, tiling.block_rows), num_splits)
    _multiply[grid](
        rounded_TI,
        x_scale_T1,
        weight_OI,
        scale,
        bias_O,
        sums,
        num_rows,
        num_inputs,
        num_outputs,
        triton.cdiv(triton.cdiv(num_inputs, tiling.block_inputs), num_splits) * tiling.block_inputs,
        HAS_BIAS=bias_O is not None and not is_split,
        HAS_BLOCKS=scale.shape != (num_outputs, 1),
        IS_EVEN=num_inputs % tiling.block_inputs == 0,
        IS_SPLIT=is_split,
        BLOCK_O=tiling.block_outputs,
        BLOCK_T=tiling.block_rows,
        BLOCK_I=tiling.block_inputs,
        SCALE_BLOCK=BLOCK,
        HAS_EARLY_START=starts_early,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        launch_pdl=starts_early,
    )
    if is_split:
        _add_splits[(triton.cdiv(out_TO.numel(), _SUM_ELEMENTS),)](
            sums,
            bias_O,
            out_TO,
            out_TO.numel(),
            num_outputs,
            NUM_SPLITS=num_splits,
            HAS_BIAS=bias_O is not None,
            BLOCK_ELEMENTS=_SUM_ELEMENTS,
            HAS_EARLY_START=starts_early,
            launch_pdl=starts_early,
        )
    return out_TO


def launch_round_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """`round_rows` on a GPU."""
    num_rows, num_inputs = x_TI.shape
    rounded_TI = torch.empty(x_TI.shape, dtype=FP8_DTYPE, device=x_TI.device)
    scale_T1 = torch.empty((num_rows, 1), dtype=torch.float32, device=x_TI.device)
    block_inputs = triton.next_power_of_2(num_inputs)
    starts_early = has_early_start(x_TI.device)
    _round_rows[(num_rows,)](
        x_TI,
        x_TI.stride(0),
        rounded_TI,
        scale_T1,
        num_inputs,
        LARGEST=FP8_MAX,
        LEAST_SCALE=MIN_SCALE,
        BLOCK_INPUTS=block_inputs,
        HAS_EARLY_START=starts_early,
        num_warps=max(1, min(16, block_inputs // 512)),
        launch_pdl=starts_early,
    )
    return rounded_TI, scale_T1
