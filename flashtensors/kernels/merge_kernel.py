"""Triton bodies of `merge.py`: a program merges a few rows of heads.

Shapes: N parts, R rows (T x H), D head dim.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 1024
"""Elements of one part that a program reads at once."""


@triton.jit
def _add_part(total, merged, anchor, lse, part_at, is_live):
    """Add a part with its weight; a part without weight is not read."""
    weight = tl.exp(lse - anchor)
    part = tl.load(part_at, mask=is_live & (weight > 0.0)[:, None], other=0.0).to(tl.float32)
    return total + weight, merged + weight[:, None] * part


@triton.jit
def _finish(out_ptr, lse_ptr, row, at, is_live, is_row, total, merged, anchor):
    merged = merged / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=is_live)
    tl.store(lse_ptr + row, anchor + tl.log(total), mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_pair(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    is_row = row < num_rows
    is_live, at = is_row[:, None] & (dims < HEAD_DIM), row[:, None] * HEAD_DIM + dims
    lse_a = tl.load(lse_a_ptr + row, mask=is_row, other=0.0)
    lse_b = tl.load(lse_b_ptr + row, mask=is_row, other=0.0)
    peak = tl.maximum(lse_a, lse_b)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    merged = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    total, merged = _add_part(total, merged, anchor, lse_a, out_a_ptr + at, is_live)
    total, merged = _add_part(total, merged, anchor, lse_b, out_b_ptr + at, is_live)
    _finish(out_ptr, lse_ptr, row, at, is_live, is_row, total, merged, anchor)


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def _merge_parts(
    parts_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    num_parts,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    is_row = row < num_rows
    is_live, at = is_row[:, None] & (dims < HEAD_DIM), row[:, None] * HEAD_DIM + dims
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for part in range(num_parts):
        part_row = (tl.full([], 0, tl.int64) + part) * num_rows
        peak = tl.maximum(peak, tl.load(lses_ptr + part_row + row, mask=is_row, other=0.0))
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    merged = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for part in range(num_parts):
        part_row = (tl.full([], 0, tl.int64) + part) * num_rows
        lse = tl.load(lses_ptr + part_row + row, mask=is_row, other=0.0)
        total, merged = _add_part(total, merged, anchor, lse, parts_ptr + part_row * HEAD_DIM + at, is_live)
    _finish(out_ptr, lse_ptr, row, at, is_live, is_row, total, merged, anchor)


def launch_merge_pair(out_a_THD: Tensor, lse_a_TH: Tensor, out_b_THD: Tensor, lse_b_TH: Tensor, out: Tensor) -> Tensor:
    """Merge two parts into `out`; returns the lse. Arguments as `merge_pair` has checked them."""
    lse_TH = torch.empty(lse_a_TH.shape, dtype=torch.float32, device=out.device)
    if out.numel():
        parts = (out_a_THD, lse_a_TH, out_b_THD, lse_b_TH)
        grid, num_rows, blocks = _tiling(out)
        _merge_pair[grid](*(part.contiguous() for part in parts), out, lse_TH, num_rows, **blocks)
    return lse_TH


def launch_merge_parts(out_NTHD: Tensor, lse_NTH: Tensor, out: Tensor) -> Tensor:
    """Merge N parts into `out`; returns the lse. Arguments as `merge_parts` has checked them."""
    lse_TH = torch.empty(lse_NTH.shape[1:], dtype=torch.float32, device=out.device)
    if out.numel():
        grid, num_rows, blocks = _tiling(out)
        _merge_parts[grid](
            out_NTHD.contiguous(), lse_NTH.contiguous(), out, lse_TH, out_NTHD.shape[0], num_rows, **blocks
        )
    return lse_TH


def _tiling(out: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, rows, and the compile-time sizes."""
    head_dim = out.shape[-1]
    num_rows, block_dim = out.numel() // head_dim, 1 << (head_dim - 1).bit_length()
    block_rows = max(1, _TILE_ELEMENTS // block_dim)
    num_warps = max(1, min(block_rows * block_dim // 512, 8))
    blocks = {"HEAD_DIM": head_dim, "BLOCK_ROWS": block_rows, "BLOCK_DIM": block_dim, "num_warps": num_warps}
    return (-(-num_rows // block_rows),), num_rows, blocks
