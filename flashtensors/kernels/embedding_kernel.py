"""Triton body of `embedding.py`: a grid of rows x column blocks.

Shapes: T ids, V vocabulary, E hidden size.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
"""Columns of a program: two 16-byte loads in flight for each of 128 threads."""


@triton.jit
def _embed(
    token_ids_ptr,
    table_ptr,
    out_ptr,
    num_ids,
    table_row_stride,
    out_row_stride,
    scale,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < NUM_COLUMNS
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    is_known = (token_id >= 0) & (token_id < num_ids)
    x = tl.load(table_ptr + token_id * table_row_stride + columns, mask=is_column & is_known, other=0.0)
    scaled = (x.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row_stride + columns, scaled, mask=is_column)


def launch_embed(token_ids_T: Tensor, table_VE: Tensor, scale: float, out: Tensor) -> Tensor:
    """Run the kernel on arguments that `embed` has checked; returns `out`."""
    if out.numel() == 0:
        return out
    (num_rows, num_columns), num_ids = out.shape, table_VE.shape[0]
    block = min(_BLOCK, triton.next_power_of_2(num_columns))
    _embed[(num_rows, triton.cdiv(num_columns, block))](
        token_ids_T.contiguous(),
        table_VE,
        out,
        num_ids,
        table_VE.stride(0),
        out.stride(0),
        scale,
        NUM_COLUMNS=num_columns,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
    return out
