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
