"""Attention over pages in plain Triton: split over keys, heads of a group packed into one tile, merged where it ends.

One program takes a work item (`work_queue.py`) and a key-value head: a tile of BLOCK_M rows, which are the G query
heads of each of its tokens, against a chunk of keys. Softmax runs online in base 2 (Milakov and Gimelshein, 2018). A
tile that was split leaves its rows' maximum, sum and unnormalised output; the program that arrives last merges them in
order of the splits, so the sum does not depend on who was last (Flash-Decoding, 2023, without its second launch).
Tiles of a group leave their sums too, and the members of the group add them to their own (`groups.py`).

Memory bound for decode, on any GPU; also the oracle of the Hopper kernel, which takes the same items.

    rows      r = token * G + head within the group
    scores    s = cap * tanh(q·k * scale / cap)         (no cap: q·k * scale)
    out       sum_j softmax(s)_j v_j, the softmax's sum also holding exp(sink) of the row's head
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportUnusedVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from .finish import finish_rows
from .fp8_pairs import split_dims, widen_pairs
from .groups import add_group_sums


@triton.jit
def _read_item(items, item, NUM_KV_HEADS: tl.constexpr, RECORD_INTS: tl.constexpr):
    """The record of an item, as `work_queue.py` lists it."""
    at = items + item // NUM_KV_HEADS * RECORD_INTS
    return (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
        tl.load(at + 6), tl.load(at + 7), tl.load(at + 8),
    )  # fmt: skip


@triton.jit(
    do_not_specialize_on_alignment=["query_starts", "block_tables", "owners"],
    do_not_specialize=["window", "stride_table"],
)
def attend_split(  # noqa: D103 - the module's docstring is its own
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    items,
    counts,
    partial_out,
    partial_sums,
    arrivals,
    query_starts,
    block_tables,
    sinks_ptr,
    tree_ptr,
    owners,
    groups,
    group_out,
    group_sums,
    k_scales_ptr,
    v_scales_ptr,
    scale_log2,
    cap_log2,
    window,
    stride_qt,
    stride_qh,
    stride_page,
    stride_kv_head,
    stride_slot,
    stride_ot,
    stride_oh,
    stride_table,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    MERGE: tl.constexpr,
    STAGES: tl.constexpr,
    RECORD_INTS: tl.constexpr,
    GROUP_INTS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    UNIT_HEADS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_CONVERSION: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    if HAS_EARLY_START:  # this program may have been launched before the kernel in front of it has ended
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PADDED)
    is_dim = d < D
    # of a cache's row: its dims, or pairs of them
    COLUMNS: tl.constexpr = D_PADDED // 2 if HAS_PAIRS else D_PADDED
    column = tl.arange(0, COLUMNS)
    is_column = column < (D // 2 if HAS_PAIRS else D)
    # read along with the number of items, not after it: an item is a few dependent reads before the first key
    row0, position0, num_tokens, key_begin, key_end, split, num_splits, sequence, slot = _read_item(
        items, tl.program_id(0), NUM_KV_HEADS, RECORD_INTS
    )
    num_items = tl.load(counts) * NUM_KV_HEADS
    item = tl.program_id(0)
    # dealt forth and back: items come with falling numbers of keys, so all programs get about as many
    for dealt in tl.range(tl.num_programs(0), num_items + tl.num_programs(0), tl.num_programs(0), num_stages=1):
        kv_head = item % NUM_KV_HEADS
        if (num_tokens > 0) & (item < num_items):
            is_row = r < num_tokens * GROUP
            token = row0 + r // GROUP
            head = kv_head * GROUP + r % GROUP
            position = position0 + r // GROUP
            q_at = token.to(tl.int64) * stride_qt + head * stride_qh
            q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=is_row[:, None] & is_dim[None, :], other=0.0)
            if HAS_PAIRS:
                q, q_odd = split_dims(q, BLOCK_M, D_PADDED)
            score_scale = scale_log2
            if HAS_SCALES:
                score_scale = scale_log2 * tl.load(k_scales_ptr + kv_head)
            if HAS_TREE:
                tree = tl.load(tree_ptr + token, mask=is_row, other=0)
                span_begin = position0 - (row0 - tl.load(query_starts + sequence))
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
            acc_odd = acc
            table = block_tables + sequence.to(tl.int64) * stride_table
            # not from key_begin on: Triton before 3.8 forgets what a loop carries if only an inner loop's bounds use it
            for offset in tl.range(0, key_end - key_begin, BLOCK_N, num_stages=STAGES):
                key = key_begin + offset
                n = key + tl.arange(0, BLOCK_N)
                is_key = n < key_end
                if BLOCK_N <= PAGE:
                    page = tl.load(table + key // PAGE).to(tl.int64)
                    in_page = key % PAGE + tl.arange(0, BLOCK_N)
                    at = page * stride_page + kv_head * stride_kv_head + in_page * stride_slot
                else:
                    page = tl.load(table + n // PAGE, mask=is_key, other=0).to(tl.int64)
                    at = page * stride_page + kv_head * stride_kv_head + (n % PAGE) * stride_slot
                # keys and values have one layout: separate offsets would cost 25 registers, and a program per SM
                kv_at = at[:, None] + column[None, :]
                is_kept = is_key[:, None] if D == D_PADDED else is_key[:, None] & is_column[None, :]
                k = tl.load(k_ptr + kv_at, mask=is_kept, other=0 if HAS_PAIRS else 0.0)
                if HAS_PAIRS:
                    k, k_odd = widen_pairs(k, HAS_CONVERSION)
                s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
                if HAS_PAIRS:
                    s = tl.dot(q_odd, tl.trans(k_odd), s)
                s = s * score_scale
                if HAS_CAP:
                    e = tl.exp2(-2.8853900817779268 * tl.abs(s / cap_log2))
                    s = tl.where(s < 0, -cap_log2, cap_log2) * (1 - e) / (1 + e)
                is_seen = is_key[None, :] & (r >= 0)[:, None]
                if HAS_TREE:
                    drafted = n - span_begin
                    bit = (tree[:, None] >> tl.maximum(drafted, 0)[None, :].to(tl.int64)) & 1
                    is_seen &= (drafted < 0)[None, :] | (bit == 1)
                if IS_CAUSAL:
                    is_seen &= n[None, :] <= position[:, None]
                if HAS_WINDOW:
                    is_seen &= n[None, :] > position[:, None] - window
                s = tl.where(is_seen, s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                shrink = tl.exp2(m - m_safe)
                p = tl.exp2(s - m_safe[:, None])
                total = total * shrink + tl.sum(p, 1)
                p = p.to(q.dtype)
                v = tl.load(v_ptr + kv_at, mask=is_kept, other=0 if HAS_PAIRS else 0.0)
                if HAS_PAIRS:
                    v, v_odd = widen_pairs(v, HAS_CONVERSION)
                    acc_odd = tl.dot(p, v_odd, acc_odd * shrink[:, None])
                acc = tl.dot(p, v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
                m = m_new
            if HAS_PAIRS:
                acc = tl.join(acc, acc_odd).reshape(BLOCK_M, D_PADDED)
            if num_splits == 1:
                if HAS_GROUPS:
                    m, total, acc = add_group_sums(
                        m, total, acc, token, head, is_row, tl.load(owners + sequence), groups, group_out, group_sums,
                        GROUP_INTS, GROUP_TOKENS, GROUP_ROWS, UNIT_HEADS, NUM_KV_HEADS * GROUP // UNIT_HEADS,
                        HEAD_ROWS, TOKEN_ROWS, D, D_PADDED,
                    )  # fmt: skip
                finish_rows(
                    out_ptr, lse_ptr, sinks_ptr, v_scales_ptr, kv_head, token, head, is_row, m, total, acc, stride_ot,
                    stride_oh, NUM_KV_HEADS * GROUP, D, D_PADDED, HAS_SINKS, HAS_SCALES, HAS_LSE,
                )  # fmt: skip
            else:
                mine = tl.full([], 0, tl.int64) + slot * NUM_KV_HEADS + kv_head
                out_at = partial_out + mine * ROWS * D + r[:, None] * D + d[None, :]
                tl.store(out_at, acc, mask=is_row[:, None] & is_dim[None, :])
                tl.store(partial_sums + mine * 2 * ROWS + r, m, mask=is_row)
                tl.store(partial_sums + mine * 2 * ROWS + ROWS + r, total, mask=is_row)
                tl.debug_barrier()
                first = (slot - split) * NUM_KV_HEADS + kv_head
                arrived = -2
                if split >= 0:
                    arrived = tl.atomic_add(arrivals + first, 1, sem="acq_rel")
                if arrived == num_splits - 1:
                    rr = tl.arange(0, ROWS)
                    w = tl.arange(0, MERGE)
                    m_WR = tl.full([MERGE, ROWS], float("-inf"), tl.float32)
                    total_WR = tl.zeros([MERGE, ROWS], tl.float32)
                    out_WRD = tl.zeros([MERGE, ROWS, D_PADDED], tl.float32)
                    for i in tl.range(0, num_splits, MERGE):
                        other = tl.full([], 0, tl.int64) + first + (i + w) * NUM_KV_HEADS
                        is_there = ((i + w) < num_splits)[:, None] & (rr < num_tokens * GROUP)[None, :]
                        sums_at = partial_sums + other[:, None] * 2 * ROWS + rr[None, :]
                        m_i = tl.load(sums_at, mask=is_there, other=float("-inf"), cache_modifier=".cg")
                        total_i = tl.load(sums_at + ROWS, mask=is_there, other=0.0, cache_modifier=".cg")
                        part_at = (
                            partial_out + other[:, None, None] * ROWS * D + rr[None, :, None] * D + d[None, None, :]
                        )
                        is_part = is_there[:, :, None] & is_dim[None, None, :]
                        out_i = tl.load(part_at, mask=is_part, other=0.0, cache_modifier=".cg")
                        m_new = tl.maximum(m_WR, m_i)
                        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                        a = tl.exp2(m_WR - m_safe)
                        b = tl.exp2(m_i - m_safe)
                        total_WR = total_WR * a + total_i * b
                        out_WRD = out_WRD * a[:, :, None] + out_i * b[:, :, None]
                        m_WR = m_new
                    m_R = tl.max(m_WR, 0)
                    a = tl.exp2(m_WR - tl.where(m_R == float("-inf"), 0.0, m_R)[None, :])
                    total_R = tl.sum(total_WR * a, 0)
                    out_RD = tl.sum(out_WRD * a[:, :, None], 0)
                    token_R, head_R = row0 + rr // GROUP, kv_head * GROUP + rr % GROUP
                    is_row_R = rr < num_tokens * GROUP
                    if HAS_GROUPS:
                        m_R, total_R, out_RD = add_group_sums(
                            m_R, total_R, out_RD, token_R, head_R, is_row_R, tl.load(owners + sequence), groups,
                            group_out, group_sums, GROUP_INTS, GROUP_TOKENS, GROUP_ROWS, UNIT_HEADS,
                            NUM_KV_HEADS * GROUP // UNIT_HEADS, HEAD_ROWS, TOKEN_ROWS, D, D_PADDED,
                        )  # fmt: skip
                    finish_rows(
                        out_ptr, lse_ptr, sinks_ptr, v_scales_ptr, kv_head, token_R, head_R, is_row_R, m_R, total_R,
                        out_RD, stride_ot, stride_oh, NUM_KV_HEADS * GROUP, D, D_PADDED, HAS_SINKS, HAS_SCALES,
                        HAS_LSE,
                    )  # fmt: skip
                    tl.store(arrivals + first, 0)
        item = 2 * dealt - 1 - item
        if item < num_items:
            row0, position0, num_tokens, key_begin, key_end, split, num_splits, sequence, slot = _read_item(
                items, item, NUM_KV_HEADS, RECORD_INTS
            )
