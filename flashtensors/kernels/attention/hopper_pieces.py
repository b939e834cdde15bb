"""Ends of tiles in the streaming decode kernel: adding up pieces in the order of keys, normalising rows.

Shapes: W pieces added up at a time, R rows, D head dim. Sums are of base-2 exponents; a row that saw nothing has a
maximum of -1e30 and a sum of 0.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def finish_rows(out_ptr, lse_ptr, sinks_ptr, row0, kv_head, r, d, is_row, m, total, acc, stride_ot, stride_oh,
            NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HAS_SINKS: gl.constexpr,
            HAS_LSE: gl.constexpr):  # fmt: skip
    """Normalise rows and store them; rows that see nothing become 0 with an lse of -inf."""
    token, head = row0 + r // GROUP, kv_head * GROUP + r % GROUP
    if HAS_SINKS:
        sink = gl.load(sinks_ptr + head, mask=is_row, other=0.0).to(gl.float32) * 1.4426950408889634
        m_next = gl.maximum(m, sink)
        shrink = gl.exp2(m - m_next)
        total = total * shrink + gl.exp2(sink - m_next)
        acc = acc * shrink[:, None]
        m = m_next
    divisor = gl.where(total == 0.0, 1.0, total)
    out = acc * (1.0 / divisor)[:, None]
    out_at = (token.to(gl.int64) * stride_ot + head * stride_oh)[:, None] + d[None, :]
    gl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    if HAS_LSE:
        lse = gl.where(total == 0.0, float("-inf"), (m + gl.log2(divisor)) * 0.6931471805599453)
        gl.store(lse_ptr + token * (NUM_KV_HEADS * GROUP) + head, lse, mask=is_row)


@gluon.jit
def add_group_sums(m, total, acc, row0, kv_head, rs, r, d, num_rows, group, records, group_out, group_sums,
                   GROUP: gl.constexpr, NUM_HEADS: gl.constexpr, D: gl.constexpr, GROUP_INTS: gl.constexpr,
                   TILE: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Add what `group` of `groups.py`, its parent and so on left for rows to their sums; `rs` and `r` are those rows.

    TILE: tokens, rows, heads of a unit, rows between heads and between tokens of a group's tile (`TileShape`).
    layout: of `acc`.
    """
    AT_ONCE: gl.constexpr = 128 // D if D < 128 else 1
    while group >= 0:
        record = records + group * GROUP_INTS
        first_row, slot, splits = gl.load(record), gl.load(record + 6), gl.load(record + 7)
        num_tiles = (gl.load(record + 1) + TILE[0] - 1) // TILE[0]
        group = gl.load(record + 4)
        at_s = _group_rows(rs, row0 - first_row, kv_head, num_tiles, slot, splits, GROUP, NUM_HEADS, TILE)
        at = _group_rows(r, row0 - first_row, kv_head, num_tiles, slot, splits, GROUP, NUM_HEADS, TILE)
        STEP: gl.constexpr = NUM_HEADS // TILE[2] * TILE[1]
        for i in range(0, splits, AT_ONCE):
            for j in gl.static_range(AT_ONCE):
                is_there = i + j < splits
                # a tile's maxima come before its sums
                tile_s = at_s + (i + j) * STEP
                sums_at = group_sums + tile_s + tile_s // TILE[1] * TILE[1]
                m_i = gl.load(sums_at, mask=(rs < num_rows) & is_there, other=-1.0e30)
                total_i = gl.load(sums_at + TILE[1], mask=(rs < num_rows) & is_there, other=0.0)
                out_at = ((at + (i + j) * STEP) * D)[:, None] + d[None, :]
                acc_i = gl.load(group_out + out_at, mask=((r < num_rows) & is_there)[:, None], other=0.0)
                m_next = gl.maximum(m, m_i)
                a, b = gl.exp2(m - m_next), gl.exp2(m_i - m_next)
                total = total * a + total_i * b
                m = m_next
                a, b = gl.convert_layout(a, gl.SliceLayout(1, layout)), gl.convert_layout(b, gl.SliceLayout(1, layout))
                acc = acc * a[:, None] + acc_i * b[:, None]
    return m, total, acc


@gluon.jit
def _group_rows(r, row0, kv_head, num_tiles, slot, splits, GROUP: gl.constexpr, NUM_HEADS: gl.constexpr,
                TILE: gl.constexpr):  # fmt: skip
    """Where rows stand among those of all tiles, of the first split."""
    token, head = row0 + r // GROUP, kv_head * GROUP + r % GROUP
    tile = (slot + (num_tiles - 1 - token // TILE[0]) * splits).to(gl.int64) * (NUM_HEADS // TILE[2]) + head // TILE[2]
    return tile * TILE[1] + head % TILE[2] * TILE[3] + token % TILE[0] * TILE[4]


@gluon.jit
def merge_pieces(out_ptr, lse_ptr, sinks_ptr, partial_out, partial_sums, first, num_pieces, row0, kv_head, num_rows,
           stride_ot, stride_oh, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr,
           D: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr):  # fmt: skip
    """Add up the pieces that programs from `first` on have left; a thread has all pieces of its elements."""
    MERGED: gl.constexpr = 16 if ROWS * D <= 512 else 8192 // (ROWS * D)
    ROW_WARPS: gl.constexpr = ROWS if ROWS < 4 else 4
    WIDTH: gl.constexpr = D * ROW_WARPS // 128 if D * ROW_WARPS > 128 else 1
    layout: gl.constexpr = gl.BlockedLayout([1, 1, WIDTH], [1, 1, 32], [1, ROW_WARPS, 4 // ROW_WARPS], [2, 1, 0])
    w = gl.arange(0, MERGED, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    rr = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    d3 = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    m_WR = gl.full([MERGED, ROWS], -1.0e30, gl.float32, gl.SliceLayout(2, layout))
    total_WR = gl.zeros([MERGED, ROWS], gl.float32, gl.SliceLayout(2, layout))
    out_WRD = gl.zeros([MERGED, ROWS, D], gl.float32, layout)
    for i in range(0, num_pieces, MERGED):
        slot = 2 * (first + i + w) + gl.where(i + w == 0, 1, 0)
        is_there = ((i + w) < num_pieces)[:, None] & (rr < num_rows)[None, :]
        sums_at = partial_sums + slot[:, None] * (2 * ROWS) + rr[None, :]
        m_i = gl.load(sums_at, mask=is_there, other=-1.0e30, cache_modifier=".cg")
        total_i = gl.load(sums_at + ROWS, mask=is_there, other=0.0, cache_modifier=".cg")
        part_at = (slot[:, None] * (ROWS * D) + rr[None, :] * D)[:, :, None] + d3[None, None, :]
        out_i = gl.load(partial_out + part_at, mask=is_there[:, :, None], other=0.0, cache_modifier=".cg")
        m_next = gl.maximum(m_WR, m_i)
        a = gl.exp2(m_WR - m_next)
        b = gl.exp2(m_i - m_next)
        total_WR = total_WR * a + total_i * b
        out_WRD = out_WRD * a[:, :, None] + out_i * b[:, :, None]
        m_WR = m_next
    m_R = gl.max(m_WR, 0)
    a = gl.exp2(m_WR - m_R[None, :])
    total_R = gl.sum(total_WR * a, 0)
    out_RD = gl.sum(out_WRD * a[:, :, None], 0)
    out_layout: gl.constexpr = gl.SliceLayout(0, layout)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
    d = gl.arange(0, D, gl.SliceLayout(0, out_layout))
    finish_rows(out_ptr, lse_ptr, sinks_ptr, row0, kv_head, r, d, r < num_rows,
            gl.convert_layout(m_R, gl.SliceLayout(1, out_layout)),
            gl.convert_layout(total_R, gl.SliceLayout(1, out_layout)), out_RD, stride_ot, stride_oh, NUM_KV_HEADS,
            GROUP, HAS_SINKS, HAS_LSE)  # fmt: skip
