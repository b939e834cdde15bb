"""The end of a row of attention: sinks, the division by its sum, and where it goes."""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish_rows(
    out_ptr,
    lse_ptr,
    sinks_ptr,
    v_scales_ptr,
    kv_head,
    token,
    head,
    is_row,
    m,
    total,
    acc,
    stride_ot,
    stride_oh,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Normalise rows and store them; fully masked rows become 0 with an lse of -inf."""
    d = tl.arange(0, D_PADDED)
    is_kept = is_row[:, None] & (d < D)[None, :]
    out_at = token.to(tl.int64) * stride_ot + head * stride_oh
    if HAS_SCALES:
        acc = acc * tl.load(v_scales_ptr + kv_head)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634
        m_new = tl.maximum(m, sink)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        shrink = tl.exp2(m - m_safe)
        acc = acc * shrink[:, None]
        total = total * shrink + tl.exp2(sink - m_safe)
        m = m_new
    divisor = tl.where(total == 0, 1.0, total)
    out = acc / divisor[:, None]
    tl.store(out_ptr + out_at[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=is_kept)
    if HAS_LSE:
        lse = tl.where(total == 0, float("-inf"), (m + tl.log2(divisor)) * 0.6931471805599453)
        tl.store(lse_ptr + token * NUM_HEADS + head, lse, mask=is_row)
