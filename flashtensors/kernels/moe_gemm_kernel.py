"""Products of the rows of each expert with its weights, for many rows: tiles of `moe_sort_kernel.py`.

The first launch of `_multiply` gathers the rows of a tile, multiplies them with a block of gate and the same block of
up, and leaves `silu(gate) * up * w` at the tile's places. The second multiplies these with `down` and leaves the result
at its pair. `_combine` adds the k pairs of a row in order, so the sum is the same each time, without atomics.

Programs go through tiles in bands of GROUP_TILES, columns within a band: the weights of a band's experts are read from
memory once, and by the other tiles from the L2 cache. The last tile of an expert is computed with half the lines where
they are enough: with 256 rows an expert, that saves a tenth of the products.

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
    """Expert of a tile, its first place, and the end of the expert's places."""
    experts = tl.arange(0, NUM_COLUMNS)
    tile_ends = tl.load(tile_ends_ptr + experts, mask=experts < NUM_EXPERTS, other=2**31 - 1)
    is_before = tile_ends <= tile
    expert = tl.sum(is_before.to(tl.int32), 0)
    first_tile = tl.max(tl.where(is_before, tile_ends, 0), 0)
    return expert, tl.load(starts_ptr + expert) + (tile - first_tile) * BLOCK_M, tl.load(ends_ptr + expert)


@triton.jit
def load_weights(weights_ptr, first_row, row_offsets, columns, NUM_COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr):
    """Block of a matrix of weights; beyond the last column, zeros. `first_row` may be far, `row_offsets` are near."""
    at = weights_ptr + first_row.to(tl.int64) * NUM_COLUMNS
    at += row_offsets[:, None] * NUM_COLUMNS + columns[None]
    return tl.load(at) if IS_EVEN else tl.load(at, mask=(columns < NUM_COLUMNS)[None], other=0.0)


@triton.jit
def load_rows(rows_at, is_row, columns, NUM_COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr):
    """Columns of the rows that begin at `rows_at`; zeros where there is no row or no column."""
    mask = is_row[:, None]
    if not IS_EVEN:
        mask = mask & (columns < NUM_COLUMNS)[None]
    return tl.load(rows_at[:, None] + columns[None], mask=mask, other=0.0)


@triton.jit
def gated_products(
    x_at,
    is_row,
    weights_ptr,
    expert,
    block,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`silu(gate x) * (up x)` of the rows that begin at `x_at`, for one block of columns."""
    IS_EVEN: tl.constexpr = HIDDEN % BLOCK_K == 0
    offsets = tl.arange(0, BLOCK_N)
    row_offsets = tl.where(block * BLOCK_N + offsets < INNER, offsets, 0)
    gate_row = expert * (2 * INNER) + block * BLOCK_N
    gate = tl.zeros([ROWS, BLOCK_N], tl.float32)
    up = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for k in range(0, HIDDEN, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        x = load_rows(x_at, is_row, columns, HIDDEN, IS_EVEN)
        gate_weights = load_weights(weights_ptr, gate_row, row_offsets, columns, HIDDEN, IS_EVEN)
        up_weights = load_weights(weights_ptr, gate_row + INNER, row_offsets, columns, HIDDEN, IS_EVEN)
        gate = tl.dot(x, gate_weights.T, gate, input_precision=PRECISION)
        up = tl.dot(x, up_weights.T, up, input_precision=PRECISION)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def down_products(
    hidden_at,
    is_row,
    weights_ptr,
    expert,
    block,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`down h` of the rows that begin at `hidden_at`, for one block of columns."""
    IS_EVEN: tl.constexpr = INNER % BLOCK_K == 0
    offsets = tl.arange(0, BLOCK_N)
    row_offsets = tl.where(block * BLOCK_N + offsets < HIDDEN, offsets, 0)
    update = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for k in range(0, INNER, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        hidden = load_rows(hidden_at, is_row, columns, INNER, IS_EVEN)
        weights = load_weights(weights_ptr, expert * HIDDEN + block * BLOCK_N, row_offsets, columns, INNER, IS_EVEN)
        update = tl.dot(hidden, weights.T, update, input_precision=PRECISION)
    return update


@triton.jit
def _multiply_tile(in_ptr, weights_ptr, out_ptr, pair_weights_ptr, pairs_ptr, first, end, expert, block, row_stride,
                   ROWS: tl.constexpr, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_DOWN: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    WIDTH: tl.constexpr = HIDDEN if IS_DOWN else INNER
    places = first + tl.arange(0, ROWS)
    is_used = places < end
    if IS_DOWN:
        in_at = in_ptr + places.to(tl.int64) * INNER
        out = down_products(
            in_at, is_used, weights_ptr, expert, block, ROWS, HIDDEN, INNER, BLOCK_N, BLOCK_K, PRECISION
        )
        rows = tl.load(pairs_ptr + places, mask=is_used, other=0)
    else:
        pairs = tl.load(pairs_ptr + places, mask=is_used, other=0)
        in_at = in_ptr + (pairs // TOP_K).to(tl.int64) * row_stride
        out = gated_products(
            in_at, is_used, weights_ptr, expert, block, ROWS, HIDDEN, INNER, BLOCK_N, BLOCK_K, PRECISION
        )
        out *= tl.load(pair_weights_ptr + pairs, mask=is_used, other=0.0)[:, None]
        rows = places
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * WIDTH + n[None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_used[:, None] & (n < WIDTH)[None])


@triton.jit(do_not_specialize=["max_tiles"])
def _multiply(
    in_ptr,
    weights_ptr,
    out_ptr,
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
    HAS_HALVES: tl.constexpr,
    IS_DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The first product, from rows to places; or, where IS_DOWN, the second, from places to pairs."""
    WIDTH: tl.constexpr = HIDDEN if IS_DOWN else INNER
    tile, block = _program_tile(max_tiles, (WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP_TILES)
    if tile >= tl.load(tile_ends_ptr + NUM_EXPERTS - 1):
        return
    expert, first, end = _tile_places(tile, starts_ptr, ends_ptr, tile_ends_ptr, NUM_EXPERTS, NUM_COLUMNS, BLOCK_M)
    if HAS_HALVES and end - first <= BLOCK_M // 2:
        _multiply_tile(in_ptr, weights_ptr, out_ptr, pair_weights_ptr, pairs_ptr, first, end, expert, block, row_stride,
                       BLOCK_M // 2, TOP_K, HIDDEN, INNER, BLOCK_N, BLOCK_K, IS_DOWN, PRECISION)  # fmt: skip
    else:
        _multiply_tile(in_ptr, weights_ptr, out_ptr, pair_weights_ptr, pairs_ptr, first, end, expert, block, row_stride,
                       BLOCK_M, TOP_K, HIDDEN, INNER, BLOCK_N, BLOCK_K, IS_DOWN, PRECISION)  # fmt: skip


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
