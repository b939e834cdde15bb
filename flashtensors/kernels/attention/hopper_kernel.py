"""Attention of many query rows over pages on Hopper's matrix units, in Gluon.

Three partitions of a persistent program: one warp that loads tiles through the tensor memory accelerator, page by page,
and two warpgroups of 64 rows each that compute. Within a warpgroup Q K(j+1) and P V(j) are in flight while softmax(j)
runs (FlashAttention-3, 2024). Keys run from the last tile to the first, so that only the first tiles need a mask.

Programs are dealt items as they come free, by a counter that the last deal sets back to 0: the loading warp tells the
warpgroups which. Work items (`work_queue.py`) have a tile of 64 tokens when two query heads share keys (a warpgroup for
each head), else of 128 tokens. Splits leave their sums to `merge_splits`, groups to their members.

Rows past the end of a sequence's values may hold anything and 0 * NaN is NaN, so the tail of the last tile is zeroed in
shared memory; both warpgroups write the same zeros.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _read(items, item, num_works, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr):
    """Head of an item, and of its record: row, position, rows, key begin, key end, splits, sequence, slot.

    Items of one key head are neighbours, so that what runs at a time reads keys that the L2 cache holds.
    """
    UNITS: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = item // (num_works * UNITS)
    place = item - kv_head * (num_works * UNITS)
    at = items + place // UNITS * 9
    return (
        kv_head * UNITS + place % UNITS, gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
        gl.load(at + 4), gl.load(at + 6), gl.load(at + 7), gl.load(at + 8),
    )  # fmt: skip


@gluon.jit
def _tell(told_s, item, layout: gl.constexpr):
    told_s.store(gl.full([1], 0, gl.int32, layout) + item)


@gluon.jit
def _hear(told_s, layout: gl.constexpr):
    return gl.max(told_s.load(layout), 0)


@gluon.jit
def _load_page(desc, table, key, key_end, kv_head, barrier, tile, NUM_KV_HEADS: gl.constexpr, PAGE: gl.constexpr,
               BLOCK_N: gl.constexpr):  # fmt: skip
    # chunks begin at multiples of 64 keys, so a box of at most 64 never crosses a page
    BOX: gl.constexpr = PAGE if PAGE < 64 else 64
    for i in gl.static_range(BLOCK_N // BOX):
        n = key + i * BOX
        page = gl.load(table + n // PAGE, mask=n < key_end, other=0)
        row = (page * NUM_KV_HEADS + kv_head) * PAGE + n % PAGE
        tma.async_copy_global_to_shared(desc, [row, 0], barrier, tile.slice(i * BOX, BOX))


@gluon.jit
def _load_tiles(q_desc, k_desc, v_desc, block_tables, items, num_works, dealt, bars, told_s, q_s, k_s, v_s,
                stride_table, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
                PAIR: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    q_full, q_empty, k_full, v_full, k_empty, v_empty = bars
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_items = num_works * NUM_HEADS
    turn = 0
    num_tiles = 0
    item = gl.program_id(0)
    while item < num_items:
        dealt_before = gl.atomic_add(dealt, 1)
        head, row0, _, rows, begin, end, _, sequence, _ = _read(items, item, num_works, NUM_HEADS, NUM_KV_HEADS)
        if rows > 0:
            q_head = head * 2 if PAIR else head
            table = block_tables + sequence.to(gl.int64) * stride_table
            for w in gl.static_range(2):
                mbarrier.wait(q_empty.index(w), (num_tiles & 1) ^ 1)
                _tell(told_s.index(w), item, layout)
                mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                q_row = row0 if PAIR else row0 + w * 64
                q_column = (q_head + w) * D if PAIR else q_head * D
                tma.async_copy_global_to_shared(q_desc, [q_row, q_column], q_full.index(w), q_s.index(w))
            num_tiles += 1
            num_blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
            for j in range(num_blocks):
                key = begin + (num_blocks - 1 - j) * BLOCK_N
                s = turn % STAGES
                phase = (turn // STAGES) & 1
                mbarrier.wait(k_empty.index(s), phase ^ 1)
                mbarrier.expect(k_full.index(s), BLOCK_N * D * 2)
                _load_page(k_desc, table, key, end, q_head // GROUP, k_full.index(s), k_s.index(s), NUM_KV_HEADS, PAGE,
                           BLOCK_N)  # fmt: skip
                mbarrier.wait(v_empty.index(s), phase ^ 1)
                mbarrier.expect(v_full.index(s), BLOCK_N * D * 2)
                _load_page(v_desc, table, key, end, q_head // GROUP, v_full.index(s), v_s.index(s), NUM_KV_HEADS, PAGE,
                           BLOCK_N)  # fmt: skip
                turn += 1
        # every item is followed by one deal, so this is the last of all programs
        if dealt_before == num_items - 1:
            gl.store(dealt, 0)
        item = dealt_before + gl.num_programs(0)
    for w in gl.static_range(2):
        mbarrier.wait(q_empty.index(w), (num_tiles & 1) ^ 1)
        _tell(told_s.index(w), -1, layout)
        mbarrier.arrive(q_full.index(w), count=1)


@gluon.jit
def _scores(S, scale_log2, cap_log2, HAS_CAP: gl.constexpr):
    """Scores in base 2; without a cap the scale is folded into the exponent by the caller."""
    if HAS_CAP:
        # the matrix units leave no time for an exact tanh: this one instruction is right to 2^-11
        S = cap_log2 * gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [S * (scale_log2 / cap_log2)], dtype=gl.float32, is_pure=True, pack=1
        )
    return S


@gluon.jit
def _mask(S, key, key_end, position, window, IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
          BLOCK_N: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    n = key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    is_seen = (n < key_end)[None, :] & (position > -(1 << 30))[:, None]
    if IS_CAUSAL:
        is_seen = is_seen & (n[None, :] <= position[:, None])
    if HAS_WINDOW:
        is_seen = is_seen & (n[None, :] > position[:, None] - window)
    return gl.where(is_seen, S, float("-inf"))


@gluon.jit
def _attend(w, out_ptr, lse_ptr, sinks_ptr, items, num_works, partial_out, partial_sums, bars, told_s, q_s, k_s, v_s,
            scale_log2, cap_log2, window, stride_ot, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
            PAIR: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
            HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr, HAS_LSE: gl.constexpr,
            HAS_SINKS: gl.constexpr):  # fmt: skip
    q_full, q_empty, k_full, v_full, k_empty, v_empty = bars
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    tail_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    factor = 1.0 if HAS_CAP else scale_log2
    zeros = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    told_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    turn = 0
    num_tiles = 0
    mbarrier.wait(q_full.index(w), 0)
    item = _hear(told_s.index(w), told_layout)
    while item >= 0:
        head, row0, position0, rows, begin, end, splits, _, slot = _read(
            items, item, num_works, NUM_HEADS, NUM_KV_HEADS
        )
        skip = 0 if PAIR else w * 64
        first = position0 + skip
        position = first + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        num_blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
        q = q_s.index(w)
        s = turn % STAGES
        key = begin + (num_blocks - 1) * BLOCK_N
        mbarrier.wait(k_full.index(s), (turn // STAGES) & 1)
        S = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zeros, use_acc=False, is_async=True)
        S = warpgroup_mma_wait(0, deps=(S,))
        mbarrier.arrive(k_empty.index(s), count=1)
        S = _scores(S, scale_log2, cap_log2, HAS_CAP)
        S = _mask(S, key, end, position, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N, s_layout)
        # finite, so that a row which sees nothing yet does not subtract infinities
        m = gl.maximum(gl.max(S, 1) * factor, -1.0e30)
        p = gl.exp2(S * factor - m[:, None])
        total = gl.sum(p, 1)
        p_half = gl.convert_layout(p.to(dtype), p_layout)
        acc = gl.zeros([64, D], gl.float32, o_layout)
        if key + BLOCK_N > end:
            mbarrier.wait(v_full.index(s), (turn // STAGES) & 1)
            for i in gl.static_range(BLOCK_N // 32):
                if key + i * 32 + 32 > end:
                    tail = v_s.index(s).slice(i * 32, 32)
                    n = key + i * 32 + gl.arange(0, 32, gl.SliceLayout(1, tail_layout))
                    kept = gl.where((n < end)[:, None], tail.load(tail_layout), gl.zeros([32, D], dtype, tail_layout))
                    tail.store(kept)
            fence_async_shared()
        for j in range(1, num_blocks):
            turn += 1
            s = turn % STAGES
            before = (turn - 1) % STAGES
            key = begin + (num_blocks - 1 - j) * BLOCK_N
            mbarrier.wait(k_full.index(s), (turn // STAGES) & 1)
            S_next = warpgroup_mma(q, k_s.index(s).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((turn - 1) // STAGES) & 1)
            acc_next = warpgroup_mma(p_half, v_s.index(before), acc, is_async=True)
            S = warpgroup_mma_wait(1, deps=(S_next,))
            mbarrier.arrive(k_empty.index(s), count=1)
            S = _scores(S, scale_log2, cap_log2, HAS_CAP)
            if HAS_WINDOW:
                if (key + BLOCK_N > first + 1) | (key <= first + 63 - window):
                    S = _mask(S, key, end, position, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N, s_layout)
            elif IS_CAUSAL:  # noqa: SIM102 - this is known when the kernel compiles, what follows is not
                if key + BLOCK_N > first + 1:
                    S = _mask(S, key, end, position, window, IS_CAUSAL, HAS_WINDOW, BLOCK_N, s_layout)
            m_next = gl.maximum(m, gl.max(S, 1) * factor)
            shrink = gl.exp2(m - m_next)
            p = gl.exp2(S * factor - m_next[:, None])
            total = total * shrink + gl.sum(p, 1)
            m = m_next
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
            p_half = gl.convert_layout(p.to(dtype), p_layout)
        mbarrier.arrive(q_empty.index(w), count=1)
        s = turn % STAGES
        mbarrier.wait(v_full.index(s), (turn // STAGES) & 1)
        acc = warpgroup_mma(p_half, v_s.index(s), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(s), count=1)
        turn += 1
        num_tiles += 1

        r = gl.arange(0, 64, gl.SliceLayout(1, o_layout))
        rs = gl.arange(0, 64, gl.SliceLayout(1, s_layout))
        d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        is_row = r + skip < rows
        if splits != 1:
            at = (slot * NUM_HEADS + head).to(gl.int64)
            partial_at = partial_out + at * 128 * D + (w * 64 + r)[:, None] * D + d[None, :]
            gl.store(partial_at, acc, mask=is_row[:, None])
            sums = partial_sums + at * 256 + w * 64 + rs
            gl.store(sums, m, mask=rs + skip < rows)
            gl.store(sums + 128, total, mask=rs + skip < rows)
        else:
            q_head = head * 2 + w if PAIR else head
            if HAS_SINKS:
                sink = gl.load(sinks_ptr + q_head).to(gl.float32) * 1.4426950408889634
                m_next = gl.maximum(m, sink)
                shrink = gl.exp2(m - m_next)
                total = total * shrink + gl.exp2(sink - m_next)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
                m = m_next
            inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
            acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))[:, None]
            out_at = out_ptr + ((row0 + skip + r).to(gl.int64) * stride_ot)[:, None] + (q_head * D + d)[None, :]
            gl.store(out_at, acc.to(dtype), mask=is_row[:, None])
            if HAS_LSE:
                num_q_heads: gl.constexpr = NUM_HEADS * 2 if PAIR else NUM_HEADS
                lse = (m + gl.log2(total)) * 0.6931471805599453
                gl.store(lse_ptr + (row0 + skip + rs) * num_q_heads + q_head, lse, mask=rs + skip < rows)
        mbarrier.wait(q_full.index(w), num_tiles & 1)
        item = _hear(told_s.index(w), told_layout)


@gluon.jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), count=arrivals)
    return bars


@gluon.jit(do_not_specialize_on_alignment=["block_tables"], do_not_specialize=["window", "stride_table"])
def attend_tiles(q_desc, k_desc, v_desc, out_ptr, lse_ptr, sinks_ptr, items, counts, partial_out, partial_sums,
                 block_tables, scale_log2, cap_log2, window, stride_table, stride_ot, NUM_HEADS: gl.constexpr,
                 GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, PAIR: gl.constexpr, PAGE: gl.constexpr,
                 BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
                 HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr, HAS_LSE: gl.constexpr,
                 HAS_SINKS: gl.constexpr):  # fmt: skip
    """One program for each multiprocessor; it sets up shared memory and lets its three partitions run."""
    num_works = gl.load(counts)
    dtype: gl.constexpr = q_desc.dtype
    kv_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], kv_layout)
    told_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full, q_empty = _barriers(2, 1), _barriers(2, 1)
    k_full, v_full = _barriers(STAGES, 1), _barriers(STAGES, 1)
    k_empty, v_empty = _barriers(STAGES, 2), _barriers(STAGES, 2)
    bars = (q_full, q_empty, k_full, v_full, k_empty, v_empty)
    gl.warp_specialize([
        (_attend, (0, out_ptr, lse_ptr, sinks_ptr, items, num_works, partial_out, partial_sums, bars, told_s, q_s, k_s,
                   v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS, NUM_KV_HEADS, PAIR, BLOCK_N, D, STAGES,
                   IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_LSE, HAS_SINKS)),
        (_attend, (1, out_ptr, lse_ptr, sinks_ptr, items, num_works, partial_out, partial_sums, bars, told_s, q_s, k_s,
                   v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS, NUM_KV_HEADS, PAIR, BLOCK_N, D, STAGES,
                   IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_LSE, HAS_SINKS)),
        (_load_tiles, (q_desc, k_desc, v_desc, block_tables, items, num_works, counts + 2, bars, told_s, q_s, k_s, v_s,
                       stride_table, NUM_HEADS, GROUP, NUM_KV_HEADS, PAIR, PAGE, BLOCK_N, D, STAGES)),
    ], [4, 1], [240, 24])  # fmt: skip
