"""A computing warpgroup of the Hopper kernel: 64 rows against the keys of an item, in base 2 and from the last key on.

Q K(j+1) and P V(j) are in flight while softmax(j) runs (FlashAttention-3, 2024), and the first Q K of the next item
while this one's rows are stored. Only the first tiles need a mask, or the last of a window.

Rows past the end of a sequence's values may hold anything and 0 * NaN is NaN, so what is behind the last key of a box
is zeroed in shared memory; both warpgroups write the same zeros.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_load import hear


@gluon.jit
def _scores(S, factor, cap_log2, HAS_CAP: gl.constexpr):
    """Scores in base 2; without a cap the factor is folded into the exponent by the caller."""
    if HAS_CAP:
        # the matrix units leave no time for an exact tanh: this one instruction is right to 2^-11
        S = cap_log2 * gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [S * (factor / cap_log2)], dtype=gl.float32, is_pure=True, pack=1
        )
    return S


@gluon.jit
def _mask(S, key, last, position, window, HAS_WINDOW: gl.constexpr, layout: gl.constexpr):
    n = gl.arange(0, S.shape[1], gl.SliceLayout(0, layout))
    is_seen = n[None, :] <= (last - key)[:, None]
    if HAS_WINDOW:
        is_seen = is_seen & (n[None, :] > (position - window - key)[:, None])
    return gl.where(is_seen, S, float("-inf"))


@gluon.jit
def _zero_behind(tile, num_kept):
    """Zero the rows of a tile from `num_kept` on, as far as the box that holds the last kept one goes."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = tile.shape[1]
    for i in gl.static_range(tile.shape[0] // 32):
        if i * 32 + 32 > num_kept:
            rows = tile.slice(i * 32, 32)
            n = i * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
            zeros = gl.zeros([32, COLUMNS], tile.dtype, layout)
            rows.store(gl.where((n < num_kept)[:, None], rows.load(layout), zeros))
    fence_async_shared()


@gluon.jit
def attend(w, out_ptr, lse_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr, partial_out, partial_sums, bars, told_s, q_s,
           k_s, v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
           PAIR: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
           IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr, HAS_LSE: gl.constexpr,
           HAS_SINKS: gl.constexpr, HAS_SCALES: gl.constexpr):  # fmt: skip
    """Compute warpgroup `w`'s half of every item that this program is told of."""
    q_full, q_empty, k_full, v_full, k_empty, v_empty = bars
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    UNITS: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    zeros = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    q = q_s.index(w)
    turn = 0
    num_tiles = 0
    mbarrier.wait(q_full.index(w), 0)
    head = hear(told_s, w, 0)
    mbarrier.wait(k_full.index(0), 0, pred=head >= 0)
    S = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    S = warpgroup_mma_wait(0, deps=(S,))
    mbarrier.arrive(k_empty.index(0), count=1, pred=head >= 0)
    while head >= 0:
        row0, position0, rows = hear(told_s, w, 1), hear(told_s, w, 2), hear(told_s, w, 3)
        begin, end, splits, slot = hear(told_s, w, 4), hear(told_s, w, 5), hear(told_s, w, 6), hear(told_s, w, 7)
        num_blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
        mbarrier.arrive(q_empty.index(w), count=1, pred=num_blocks == 1)
        score_scale = scale_log2
        if HAS_SCALES:
            score_scale = scale_log2 * gl.load(k_scales_ptr + head // UNITS)
        factor = 1.0 if HAS_CAP else score_scale
        skip = 0 if PAIR else w * 64
        first = position0 + skip
        position = first + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        last = gl.minimum(position, end - 1) if IS_CAUSAL else position * 0 + (end - 1)
        key = begin + (num_blocks - 1) * BLOCK_N
        S = _scores(S, score_scale, cap_log2, HAS_CAP)
        S = _mask(S, key, last, position, window, HAS_WINDOW, s_layout)
        # finite, so that a row which sees nothing yet does not subtract infinities
        m = gl.maximum(gl.max(S, 1) * factor, -1.0e30)
        p = gl.exp2(S * factor - m[:, None])
        total = gl.sum(p, 1)
        p_half = gl.convert_layout(p.to(dtype), p_layout)
        acc = gl.zeros([64, D], gl.float32, o_layout)
        if (end - key) % BOX != 0:
            mbarrier.wait(v_full.index(turn % STAGES), (turn // STAGES) & 1)
            _zero_behind(v_s.index(turn % STAGES), end - key)
        mbarrier.wait(k_full.index((turn + 1) % STAGES), ((turn + 1) // STAGES) & 1, pred=num_blocks > 1)
        for j in range(1, num_blocks):
            before = turn % STAGES
            before_phase = (turn // STAGES) & 1
            turn += 1
            s = turn % STAGES
            key = begin + (num_blocks - 1 - j) * BLOCK_N
            S_next = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), before_phase)
            acc_next = warpgroup_mma(p_half, v_s.index(before), acc, is_async=True)
            S = warpgroup_mma_wait(1, deps=(S_next,))
            mbarrier.arrive(k_empty.index(s), count=1)
            mbarrier.arrive(q_empty.index(w), count=1, pred=j == num_blocks - 1)
            S = _scores(S, score_scale, cap_log2, HAS_CAP)
            if HAS_WINDOW:
                if (key + BLOCK_N > first + 1) | (key <= first + 63 - window):
                    S = _mask(S, key, last, position, window, HAS_WINDOW, s_layout)
            elif IS_CAUSAL:  # noqa: SIM102 - this is known when the kernel compiles, what follows is not
                if key + BLOCK_N > first + 1:
                    S = _mask(S, key, last, position, window, HAS_WINDOW, s_layout)
            m_next = gl.maximum(m, gl.max(S, 1) * factor)
            shrink = gl.exp2(m - m_next)
            p = gl.exp2(S * factor - m_next[:, None])
            total = total * shrink + gl.sum(p, 1)
            m = m_next
            # a branch, over which the softmax above does not sink behind the next wait
            mbarrier.wait(k_full.index((turn + 1) % STAGES), ((turn + 1) // STAGES) & 1, pred=j + 1 < num_blocks)
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
            p_half = gl.convert_layout(p.to(dtype), p_layout)
        s = turn % STAGES
        mbarrier.wait(v_full.index(s), (turn // STAGES) & 1)
        acc_next = warpgroup_mma(p_half, v_s.index(s), acc, is_async=True)
        turn += 1
        num_tiles += 1
        mbarrier.wait(q_full.index(w), num_tiles & 1)
        head_next = hear(told_s, w, 0)
        s_next = turn % STAGES
        mbarrier.wait(k_full.index(s_next), (turn // STAGES) & 1, pred=head_next >= 0)
        # of the last item this reads tiles of before, and is not used
        S_next = warpgroup_mma(q, k_s.index(s_next).permute((1, 0)), zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc_next,))
        mbarrier.arrive(v_empty.index(s), count=1)
        if splits != 1:
            at = (slot * NUM_HEADS + head).to(gl.int64)
            _leave_sums(partial_out, partial_sums, at, rows - skip, w, m, total, acc)
        else:
            v_scale = 1.0
            if HAS_SCALES:
                v_scale = gl.load(v_scales_ptr + head // UNITS)
            _finish(out_ptr, lse_ptr, sinks_ptr, v_scale, row0 + skip, rows - skip, head * 2 + w if PAIR else head, m,
                    total, acc, stride_ot, NUM_HEADS * 2 if PAIR else NUM_HEADS, HAS_LSE, HAS_SINKS)  # fmt: skip
        S = warpgroup_mma_wait(0, deps=(S_next,))
        mbarrier.arrive(k_empty.index(s_next), count=1, pred=head_next >= 0)
        head = head_next


@gluon.jit
def _leave_sums(partial_out, partial_sums, at, num_rows, w, m, total, acc):
    """Store what a split or a group has summed, unnormalised."""
    s_layout: gl.constexpr = m.type.layout
    o_layout: gl.constexpr = acc.type.layout
    D: gl.constexpr = acc.shape[1]
    r = gl.arange(0, 64, gl.SliceLayout(1, o_layout))
    d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    gl.store(partial_out + at * 128 * D + (w * 64 + r)[:, None] * D + d[None, :], acc, mask=(r < num_rows)[:, None])
    rs = gl.arange(0, 64, s_layout)
    sums = partial_sums + at * 256 + w * 64 + rs
    gl.store(sums, m, mask=rs < num_rows)
    gl.store(sums + 128, total, mask=rs < num_rows)


@gluon.jit
def _finish(out_ptr, lse_ptr, sinks_ptr, v_scale, row0, num_rows, q_head, m, total, acc, stride_ot,
            NUM_Q_HEADS: gl.constexpr, HAS_LSE: gl.constexpr, HAS_SINKS: gl.constexpr):  # fmt: skip
    """Normalise rows and store them."""
    s_layout: gl.constexpr = m.type.layout
    o_layout: gl.constexpr = acc.type.layout
    D: gl.constexpr = acc.shape[1]
    if HAS_SINKS:
        sink = gl.load(sinks_ptr + q_head).to(gl.float32) * 1.4426950408889634
        m_next = gl.maximum(m, sink)
        shrink = gl.exp2(m - m_next)
        total = total * shrink + gl.exp2(sink - m_next)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        m = m_next
    inverse = v_scale / gl.where(total == 0.0, 1.0, total)
    out = (acc * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]).to(out_ptr.dtype.element_ty)
    # 16 bytes a thread, where shared memory has room for the exchange
    threads: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0]) if D <= 128 else o_layout
    r = gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    out_at = out_ptr + ((row0 + r).to(gl.int64) * stride_ot)[:, None] + (q_head * D + d)[None, :]
    gl.store(out_at, gl.convert_layout(out, layout), mask=(r < num_rows)[:, None])
    if HAS_LSE:
        rs = gl.arange(0, 64, s_layout)
        lse = (m + gl.log2(total)) * 0.6931471805599453
        gl.store(lse_ptr + (row0 + rs) * NUM_Q_HEADS + q_head, lse, mask=rs < num_rows)
