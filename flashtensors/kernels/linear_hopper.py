"""Launching the Hopper kernel of `linear.py`: which products it takes, how they are cut, and where parts of tiles meet.

Shapes: T rows, I inputs, O outputs.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .device_traits import is_hopper, num_multiprocessors
from .linear_kernel import multiply_few_rows
from .linear_tiling import MOST_TILE_ELEMENTS, Tiling, choose_tiling

NUM_WARPS = 4
"""That multiply: a warpgroup, whose rows are a tile's 64 outputs."""

NUM_REGISTERS = 96
"""Of a thread: enough for 64 rows (128 and 168 are no quicker), and room for programs of the kernels around."""

_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True, slots=True)
class _Sums:
    """Where programs that share tiles leave their sums, and count who has; the counts are zeros between products."""

    partials: Tensor
    arrivals: Tensor


def launch_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, tiling: Tiling | None = None) -> Tensor:
    """x Wᵀ + b for what `can_launch` allows; None for `tiling`: as measured to be best."""
    (num_rows, num_inputs), num_outputs = x_TI.shape, weight_OI.shape[0]
    if tiling is None:
        tiling = choose_tiling(num_rows, num_inputs, num_outputs, num_multiprocessors(x_TI.device))
    block_t, block_o, block_i = tiling.block_rows, tiling.block_outputs, tiling.block_inputs
    out_TO = torch.empty(num_rows, num_outputs, dtype=x_TI.dtype, device=x_TI.device)
    w_layout, x_layout = _layout(block_o, block_i, x_TI.dtype), _layout(block_t, block_i, x_TI.dtype)
    w_desc = TensorDescriptor(weight_OI, [num_outputs, num_inputs], [num_inputs, 1], [block_o, block_i], w_layout)
    x_desc = TensorDescriptor(x_TI, [num_rows, num_inputs], [x_TI.stride(0), 1], [block_t, block_i], x_layout)
    sums = _find_sums(x_TI.device) if tiling.is_split else _Sums(out_TO, out_TO)
    multiply_few_rows[(tiling.num_programs,)](
        w_desc, x_desc, out_TO, out_TO if bias_O is None else bias_O, sums.partials, sums.arrivals, num_rows,
        num_outputs, triton.cdiv(num_outputs, block_o), triton.cdiv(num_inputs, block_i), STAGES=tiling.stages,
        IS_SPLIT=tiling.is_split, HAS_BIAS=bias_O is not None, num_warps=NUM_WARPS,
        maxnreg=NUM_REGISTERS, launch_pdl=True,
    )  # fmt: skip
    return out_TO


def can_launch(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> bool:
    """Whether the kernel takes this product: Hopper, two bytes an element, rows and weight as descriptors want them."""
    return (
        x_TI.dtype == weight_OI.dtype
        and x_TI.dtype in _ELEMENTS
        and is_hopper(weight_OI.device)
        and weight_OI.is_contiguous()
        and weight_OI.shape[1] % 8 == 0
        and x_TI.stride(1) == 1
        and x_TI.stride(0) % 8 == 0
        and (x_TI.data_ptr() | weight_OI.data_ptr()) % 16 == 0
        and (bias_O is None or bias_O.is_contiguous())
    )


def _find_sums(device: torch.device) -> _Sums:
    """The sums of the current stream, or those of graphs while one is captured.

    Products of one stream may share theirs: each touches them only after it has waited for the kernel in front, and so
    for all kernels before that one. Graphs of a device share theirs because they replay in turn, as they share the
    memory of their activations. They are made beside the first product of any stream; a graph that is captured before
    that has sums of its own, which it clears for each product.
    """
    is_captured = torch.cuda.is_current_stream_capturing()
    if is_captured and None not in _sums_by_stream(device):
        return _make_sums(device)
    key = None if is_captured else torch.cuda.current_stream(device).cuda_stream
    sums = _sums_by_stream(device)
    if key not in sums:
        for owner in (key, None):
            sums.setdefault(owner, _make_sums(device))
        torch.cuda.current_stream(device).synchronize()
    return sums[key]


@functools.cache
def _sums_by_stream(device: torch.device) -> dict[int | None, _Sums]:
    return {}


def _make_sums(device: torch.device) -> _Sums:
    num_programs = num_multiprocessors(device)
    return _Sums(  # of each program: the tile that it begins in, and the one that it ends in
        partials=torch.empty(num_programs, 2, MOST_TILE_ELEMENTS, dtype=torch.float32, device=device),
        arrivals=torch.zeros(num_programs, dtype=torch.int32, device=device),
    )


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _ELEMENTS[dtype])
