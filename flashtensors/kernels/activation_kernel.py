"""Triton body of `activation.py`: fp32 inside, the product rounded once.

    gelu_tanh(g) = g * sigmoid(2 u),  u = sqrt(2/π) * (g + 0.044715 g³)      since (1 + tanh u) / 2 = sigmoid(2 u)

Shapes: T rows, M elements of gate, and of up.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from .device_traits import has_early_start

_BLOCK = 1024
"""Elements of gate that a program takes: two 16-byte loads in flight for each of 128 threads."""


@triton.jit
def _gated_product(
    gate_up_ptr,
    out_ptr,
    row_stride,
    out_row_stride,
    NUM_COLUMNS: tl.constexpr,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    """A grid of rows x column blocks, so that one row of a decode step fills several multiprocessors."""
    if HAS_EARLY_START:  # the kernel behind may be placed now; this one may run before the one in front has ended
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < NUM_COLUMNS
    gate_at = gate_up_ptr + row * row_stride + columns
    gate = tl.load(gate_at, mask=is_column, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(gate_at + NUM_COLUMNS, mask=is_column, other=0.0, eviction_policy="evict_first").to(tl.float32)
    argument = gate
    if IS_GELU:
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2/π)
    product = gate / (1.0 + tl.exp(-argument)) * up
    tl.store(out_ptr + row * out_row_stride + columns, product.to(out_ptr.dtype.element_ty), mask=is_column)


def launch_gated_product(
    gate_up: Tensor, *, is_gelu: bool, out: Tensor | None = None, block: int = _BLOCK, num_warps: int = 4
) -> Tensor:
    """`activation(gate) * up`, `[…, M]` from `[…, 2 M]`, gate first.

    Args:
        gate_up: Rows at any distance; other strides are copied first. The door has checked it.
        is_gelu: The tanh form of GELU; otherwise SiLU.
        out: Last stride 1, rows at even distances. None: a new tensor.
        block: Elements of gate of a program, a power of two.
        num_warps: Warps of a program.
    """
    shape = (*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    elif out.shape != shape or out.dtype != gate_up.dtype or out.stride(-1) != 1:
        raise ConfigError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}, but it must be {gate_up.dtype} "
            f"{list(shape)} with last stride 1"
        )
    if out.numel() == 0:
        return out
    if gate_up.stride(-1) != 1 or gate_up.dim() != 2:
        gate_up = gate_up.reshape(-1, gate_up.shape[-1]).contiguous()
    rows = out if out.dim() == 2 else out.view(-1, out.shape[-1])
    num_rows, num_columns = rows.shape
    _gated_product[(num_rows, triton.cdiv(num_columns, block))](
        gate_up,
        rows,
        gate_up.stride(0),
        rows.stride(0),
        NUM_COLUMNS=num_columns,
        IS_GELU=is_gelu,
        BLOCK=block,
        HAS_EARLY_START=has_early_start(rows.device),
        num_warps=num_warps,
        launch_pdl=has_early_start(rows.device),
    )
    return out
