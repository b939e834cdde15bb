"""Products of the rows of each expert with its weights, for many rows: tiles of `moe_sort_kernel.py`.

`_gate_up` gathers the rows of a tile, multiplies them with a block of gate and the same block of up, and leaves
`silu(gate) * up * w` at the tile's places. `_down` multiplies these and leaves the result at its pair. `_combine` adds
the k pairs of a row in order, so the sum is the same each time, without atomics.

Programs go through tiles in bands of GROUP_TILES, columns within a band: the weights of a band's experts are read from
memory once, and by the other tiles from the L2 cache. With TMA, weights come through the tensor memory accelerator,
whose boxes need no addresses of single elements.

Shapes: T rows, E hidden size, M intermediate size, X experts, P pairs of a row and an expert, N = 2 M.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _program_tile(max_tiles, NUM_BLOCKS: tl.constexpr, GROUP_TILES: tl.constexpr):
    """Tile and column block of this program."""
    program = tl.program_id(0)
    band = program // (GROUP_TILES * NUM_BLOCKS)
    band_tiles = tl.minimum(GROUP_TILES, max_tiles - band * GROUP_TILES)
    within = program % (GROUP_TILES * NUM_BLOCKS)
    return band * GROUP_TILES + within % band_tiles, within // band_tiles


@triton.jit
def _tile_places(tile, starts_ptr, ends_ptr, tile_ends_ptr, NUM_EXPERTS: tl.constexpr, NUM_COLUMNS: tl.constexpr,
                 BLOCK_M: tl.constexpr):  # fmt: skip
    """Expert of a tile, its places, and which of them are in use."""
    experts = tl.arange(0, NUM_COLUMNS)
    tile_ends = tl.load(tile_ends_ptr + experts, mask=experts < NUM_EXPERTS, other=2**31 - 1)
    is_before = tile_ends <= tile
    expert = tl.sum(is_before.to(tl.int32), 0)
    first_tile = tl.max(tl.where(is_before, tile_ends, 0), 0)
    places = tl.load(starts_ptr + expert) + (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    return expert, places, places < tl.load(ends_ptr + expert)


@triton.jit
def _weight_block(weights, row, column, row_offsets, column_offsets, NUM_COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr,
                  TMA: tl.constexpr):  # fmt: skip
    """Block of a matrix of weights that begins at `row` and `column`; beyond the last column, zeros."""
    if TMA:
        block = weights.load([row, column])
    else:
        at = weights + row.to(tl.int64) * NUM_COLUMNS + column
        at += row_offsets[:, None] * NUM_COLUMNS + column_offsets[None]
        mask = (column + column_offsets < NUM_COLUMNS)[None]
        block = tl.load(at) if IS_EVEN else tl.load(at, mask=mask, other=0.0)
    return block


@triton.jit
def _row_block(at, is_row, column, column_offsets, NUM_COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr):
    mask = is_row[:, None]
    if not IS_EVEN:
        mask = mask & (column + column_offsets < NUM_COLUMNS)[None]
    return tl.load(at + column, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up(
    x_ptr,
    weights,
    hidden_ptr,
    pair_weights_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    tile_ends_ptr,
    max_tiles,
    row_stride,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (INNER + BLOCK_N - 1) // BLOCK_N
    IS_EVEN: tl.constexpr = HIDDEN % BLOCK_K == 0
    tile, block = _program_tile(max_tiles, NUM_BLOCKS, GROUP_TILES)
    if tile >= tl.load(tile_ends_ptr + NUM_EXPERTS - 1):
        return
    expert, places, is_used = _tile_places(tile, starts_ptr, ends_ptr, tile_ends_ptr, NUM_EXPERTS, NUM_COLUMNS, BLOCK_M)
    pairs = tl.load(pairs_ptr + places, mask=is_used, other=0)
    k_offsets = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (pairs // TOP_K).to(tl.int64)[:, None] * row_stride + k_offsets[None]
    n_offsets = tl.arange(0, BLOCK_N)
    n = block * BLOCK_N + n_offsets
    row_offsets = tl.where(n < INNER, n_offsets, 0)
    gate_row = expert * (2 * INNER) + block * BLOCK_N
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        x = _row_block(x_at, is_used, k, k_offsets, HIDDEN, IS_EVEN)
        gate_weights = _weight_block(weights, gate_row, k, row_offsets, k_offsets, HIDDEN, IS_EVEN, TMA)
        gate = tl.dot(x, gate_weights.T, gate, input_precision=PRECISION)
        up_weights = _weight_block(weights, gate_row + INNER, k, row_offsets, k_offsets, HIDDEN, IS_EVEN, TMA)
        up = tl.dot(x, up_weights.T, up, input_precision=PRECISION)
    pair_weights = tl.load(pair_weights_ptr + pairs, mask=is_used, other=0.0)
    hidden = gate / (1.0 + tl.exp(-gate)) * up * pair_weights[:, None]
    out = hidden_ptr + places.to(tl.int64)[:, None] * INNER + n[None]
    tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=is_used[:, None] & (n < INNER)[None])


@triton.jit(do_not_specialize=["max_tiles"])
def _down(
    hidden_ptr,
    weights,
    updates_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    tile_ends_ptr,
    max_tiles,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    IS_EVEN: tl.constexpr = INNER % BLOCK_K == 0
    tile, block = _program_tile(max_tiles, NUM_BLOCKS, GROUP_TILES)
    if tile >= tl.load(tile_ends_ptr + NUM_EXPERTS - 1):
        return
    expert, places, is_used = _tile_places(tile, starts_ptr, ends_ptr, tile_ends_ptr, NUM_EXPERTS, NUM_COLUMNS, BLOCK_M)
    k_offsets = tl.arange(0, BLOCK_K)
    hidden_at = hidden_ptr + places.to(tl.int64)[:, None] * INNER + k_offsets[None]
    n_offsets = tl.arange(0, BLOCK_N)
    n = block * BLOCK_N + n_offsets
    row_offsets = tl.where(n < HIDDEN, n_offsets, 0)
    update = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, INNER, BLOCK_K):
        hidden = _row_block(hidden_at, is_used, k, k_offsets, INNER, IS_EVEN)
        down_weights = _weight_block(
            weights, expert * HIDDEN + block * BLOCK_N, k, row_offsets, k_offsets, INNER, IS_EVEN, TMA
        )
        update = tl.dot(hidden, down_weights.T, update, input_precision=PRECISION)
    pairs = tl.load(pairs_ptr + places, mask=is_used, other=0)
    out = updates_ptr + pairs.to(tl.int64)[:, None] * HIDDEN + n[None]
    tl.store(out, update.to(updates_ptr.dtype.element_ty), mask=is_used[:, None] & (n < HIDDEN)[None])


@triton.jit
def _combine(updates_ptr, out_ptr, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """`out_t = sum_j updates_tj`, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(updates_ptr + (row * TOP_K + j) * HIDDEN + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + columns, total.to(out_ptr.dtype.element_ty), mask=is_column)
