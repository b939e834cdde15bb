"""Products of the rows of each expert with its weights, for at most 16 rows: what counts is to read weights once.

Nothing is sorted. A program belongs to a pair of a row and an expert; if an earlier pair has the same expert it leaves,
else it computes a block of columns for all rows that chose this expert. The tile has a line for each row of the batch,
of which those with other experts are computed for nothing, as they cost no bytes.

Shapes: T rows, E hidden size, M intermediate size, X experts, k experts of a row, P = T k.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import triton
import triton.language as tl

from .moe_gemm_kernel import down_products, gated_products

DECODE_ROWS = 16
"""Rows of the batch, at most: the least that the matrix units take at once."""


@triton.jit
def _pairs_of_expert(ids_ptr, num_rows, TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Expert of this program's pair; each row's pair with it, or -1; and whether no earlier pair has it."""
    own = tl.program_id(0)
    expert = tl.load(ids_ptr + own)
    rows, places = tl.arange(0, ROWS)[:, None], tl.arange(0, TOP_K_PADDED)[None]
    pairs = rows * TOP_K + places
    is_pair = (rows < num_rows) & (places < TOP_K)
    has_expert = tl.load(ids_ptr + pairs, mask=is_pair, other=-1) == expert
    pair_of_row = tl.max(tl.where(has_expert, pairs, -1), axis=1)
    first = tl.min(tl.min(tl.where(has_expert, pairs, ROWS * TOP_K), axis=1), axis=0)
    return expert, pair_of_row, first == own


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_few(
    in_ptr,
    weights_ptr,
    out_ptr,
    pair_weights_ptr,
    ids_ptr,
    num_rows,
    row_stride,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`silu(gate) * up * w` of each pair; or, where IS_DOWN, what each pair adds to its row."""
    WIDTH: tl.constexpr = HIDDEN if IS_DOWN else INNER
    expert, pair_of_row, is_first = _pairs_of_expert(ids_ptr, num_rows, TOP_K, TOP_K_PADDED, ROWS)
    if not is_first:
        return
    is_used = pair_of_row >= 0
    block = tl.program_id(1)
    if IS_DOWN:
        in_at = in_ptr + tl.maximum(pair_of_row, 0) * INNER
        out = down_products(
            in_at, is_used, weights_ptr, expert, block, ROWS, HIDDEN, INNER, BLOCK_N, BLOCK_K, PRECISION
        )
    else:
        in_at = in_ptr + tl.arange(0, ROWS).to(tl.int64) * row_stride
        out = gated_products(
            in_at, is_used, weights_ptr, expert, block, ROWS, HIDDEN, INNER, BLOCK_N, BLOCK_K, PRECISION
        )
        out *= tl.load(pair_weights_ptr + pair_of_row, mask=is_used, other=0.0)[:, None]
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    out_at = out_ptr + pair_of_row[:, None] * WIDTH + n[None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_used[:, None] & (n < WIDTH)[None])
