"""Launching the Hopper kernel, and merging what its splits leave.

Shapes: T rows, H query heads, D head dim.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .finish import finish_rows
from .hopper_kernel import attend_tiles
from .work_queue import RECORD_INTS, WorkQueue


@triton.jit
def _merge_splits(out_ptr, lse_ptr, sinks_ptr, v_scales_ptr, items, counts, partial_out, partial_sums, stride_ot,
                  NUM_HEADS: tl.constexpr, UNITS: tl.constexpr, PAIR: tl.constexpr, D: tl.constexpr,
                  ROWS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_LSE: tl.constexpr,
                  RECORD_INTS: tl.constexpr):  # fmt: skip
    """Each program adds up ROWS rows of a tile over its splits, in order, and finishes them."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    num_q_heads: tl.constexpr = NUM_HEADS * 2 if PAIR else NUM_HEADS
    parts: tl.constexpr = 128 // ROWS
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    num_parts = tl.where(tl.load(counts + 1) > 0, tl.load(counts) * NUM_HEADS * parts, 0)
    for i in tl.range(tl.program_id(0), num_parts, tl.num_programs(0)):
        head = i // parts % NUM_HEADS
        part = (i % parts) * ROWS
        record = items + i // (parts * NUM_HEADS) * RECORD_INTS
        row0 = tl.load(record)
        rows = tl.load(record + 2)
        split = tl.load(record + 5)
        splits = tl.load(record + 6)
        if (split == 0) & (rows > 0) & (splits > 1):
            slot = tl.load(record + 8)
            m = tl.full([ROWS], -1.0e30, tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, D], tl.float32)
            for s in tl.range(0, splits):
                at = (slot + s).to(tl.int64) * NUM_HEADS + head
                m_i = tl.load(partial_sums + at * 256 + part + r)
                total_i = tl.load(partial_sums + at * 256 + 128 + part + r)
                acc_i = tl.load(partial_out + at * 128 * D + (part + r)[:, None] * D + d[None, :])
                m_next = tl.maximum(m, m_i)
                a = tl.exp2(m - m_next)
                b = tl.exp2(m_i - m_next)
                total = total * a + total_i * b
                acc = acc * a[:, None] + acc_i * b[:, None]
                m = m_next
            token = part % 64 + r if PAIR else part + r
            heads = (head * 2 + part // 64 if PAIR else head) + r * 0
            finish_rows(
                out_ptr, lse_ptr, sinks_ptr, v_scales_ptr, head // UNITS, row0 + token, heads, token < rows,
                tl.where(total == 0, float("-inf"), m), total, acc, stride_ot, D, num_q_heads, D, D, HAS_SINKS,
                HAS_SCALES, HAS_LSE,
            )  # fmt: skip


def attend_hopper(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    out_THD: Tensor,
    queue: WorkQueue,
    *,
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    lse: Tensor | None,
    num_programs: int,
    must_merge: bool,
) -> None:
    """Compute the items of `queue`; arguments as for `ragged_attention`, checked there.

    `must_merge` is False where nothing but groups is queued, which their members merge.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    _, num_kv_heads, page, _ = k_cache.shape
    is_pair = queue.num_heads * 2 == num_heads
    block_n, stages = TILES[head_dim]
    box = min(page, 64)
    q_layout, kv_layout = _layout(64, head_dim, q_THD.dtype), _layout(box, head_dim, k_cache.dtype)
    q_desc = TensorDescriptor(q_THD, [num_tokens, num_heads * head_dim], [q_THD.stride(0), 1], [64, head_dim], q_layout)
    k_desc = TensorDescriptor.from_tensor(k_cache.view(-1, head_dim), [box, head_dim], kv_layout)
    v_desc = TensorDescriptor.from_tensor(v_cache.view(-1, head_dim), [box, head_dim], kv_layout)
    log2_e = 1.4426950408889634
    lse_or_any = queue.partial_sums if lse is None else lse
    sinks_or_any = queue.partial_sums if sinks is None else sinks
    k_scales_or_any = queue.partial_sums if k_scales is None else k_scales
    v_scales_or_any = queue.partial_sums if v_scales is None else v_scales
    attend_tiles[(num_programs,)](
        q_desc, k_desc, v_desc, out_THD, lse_or_any, sinks_or_any, k_scales_or_any, v_scales_or_any, queue.items,
        queue.counts, queue.partial_out, queue.partial_sums, block_tables, scale * log2_e, (softcap or 1.0) * log2_e,
        window or 0, block_tables.stride(0), out_THD.stride(0),
        NUM_HEADS=queue.num_heads, GROUP=num_heads // num_kv_heads, NUM_KV_HEADS=num_kv_heads, PAIR=is_pair,
        PAGE=page, BLOCK_N=block_n, D=head_dim, STAGES=stages, IS_CAUSAL=is_causal,
        HAS_WINDOW=window is not None, HAS_CAP=softcap is not None, HAS_LSE=lse is not None,
        HAS_SINKS=sinks is not None, HAS_SCALES=k_scales is not None, RUN_BYTES=RUN_BYTES, num_warps=4,
    )  # fmt: skip
    if must_merge:
        _merge_splits[(4 * num_programs,)](
            out_THD, lse_or_any, sinks_or_any, v_scales_or_any, queue.items, queue.counts, queue.partial_out,
            queue.partial_sums, out_THD.stride(0), NUM_HEADS=queue.num_heads, UNITS=queue.num_heads // num_kv_heads,
            PAIR=is_pair, D=head_dim, ROWS=16, HAS_SINKS=sinks is not None, HAS_SCALES=v_scales is not None,
            HAS_LSE=lse is not None, RECORD_INTS=RECORD_INTS, launch_pdl=True,
        )  # fmt: skip


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)


TILES = {64: (128, 3), 128: (128, 2), 256: (64, 2)}
"""Head dim to (keys in a tile, stages), within 227 KB of shared memory."""

RUN_BYTES = 16 << 20
"""Keys and values of the heads that run at a time, within the L2 cache."""
