"""Triton body of `rope_append.py`: a program takes a few heads of one row, all queries, all keys or all values.

The halves of a head that turn together are two tiles, and what does not turn (partial rotary) a third. Arithmetic is in
fp32: norms round where transformers rounds, rope rounds once, and fp8 is made from the rounded value.

Shapes: T rows, H query heads, K key-value heads, D head dim, R rotary dim, N heads of a program.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_traits import has_early_start
from .rope import Rotation
from .rope_append import KvScales, QkNorm

_TILE_ELEMENTS = 1024
"""Elements of the heads of one program: 16 for each thread of two warps."""


@triton.jit
def _scale(x, inverse_rms, weight_ptr, columns, is_column, IS_GEMMA: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of normalised heads, rounded to `DTYPE` as `norm.py` does, in fp32."""
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    if IS_GEMMA:
        return (x * inverse_rms * (1.0 + weight)).to(DTYPE).to(tl.float32)
    return ((x * inverse_rms).to(DTYPE).to(tl.float32) * weight).to(DTYPE).to(tl.float32)


@triton.jit
def _turned_heads(
    x_at,
    is_head,
    cos_at,
    sin_at,
    weight_ptr,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GEMMA: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Heads at `x_at [N, 1]`, normalised and turned: both halves and the tail (unused if R = D), in fp32."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    tail_columns = ROTARY_DIM + tl.arange(0, BLOCK_TAIL)[None, :]
    in_half, in_tail = columns < HALF, tail_columns < HEAD_DIM
    first = tl.load(x_at + columns, mask=is_head & in_half, other=0.0, eviction_policy="evict_first").to(tl.float32)
    second = tl.load(x_at + HALF + columns, mask=is_head & in_half, other=0.0, eviction_policy="evict_first")
    second = second.to(tl.float32)
    tail = first
    if ROTARY_DIM < HEAD_DIM:
        tail = tl.load(x_at + tail_columns, mask=is_head & in_tail, other=0.0).to(tl.float32)
    # the same row for every head, read by each: that costs the L1 a little, a broadcast costs a barrier
    same = tl.broadcast_to(columns, BLOCK_HEADS, BLOCK_HALF)
    cos = tl.load(cos_at + same, mask=same < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + HALF + same, mask=same < HALF, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if ROTARY_DIM < HEAD_DIM:
            squares += tl.sum(tail * tail, axis=1)
        inverse_rms = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = _scale(first, inverse_rms, weight_ptr, columns, in_half, IS_GEMMA, DTYPE)
        second = _scale(second, inverse_rms, weight_ptr, HALF + columns, in_half, IS_GEMMA, DTYPE)
        if ROTARY_DIM < HEAD_DIM:
            tail = _scale(tail, inverse_rms, weight_ptr, tail_columns, in_tail, IS_GEMMA, DTYPE)
    return first * cos - second * sin, second * cos + first * sin, tail


@triton.jit
def _store_quantised(at, x, mask, scale, HAS_SCALES: tl.constexpr, DTYPE: tl.constexpr):
    """Store fp32 `x`, rounded to `DTYPE`, or then to fp8 by `scale [N, 1]`; 448 is the largest e4m3."""
    value = x.to(DTYPE)
    if HAS_SCALES:
        value = tl.maximum(value.to(tl.float32) / scale, -448.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.minimum(value, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _rope_append(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    qkv_row_stride,
    cos_row_stride,
    sin_row_stride,
    out_row_stride,
    out_head_stride,
    k_page_stride,
    k_head_stride,
    k_slot_stride,
    v_page_stride,
    v_head_stride,
    v_slot_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_GEMMA: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    """Programs of a row are neighbours: blocks of q heads, then of k heads, then of v heads."""
    if HAS_EARLY_START:  # attention comes next: its programs may be placed now, and wait for the end of these
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    HALF: tl.constexpr = ROTARY_DIM // 2
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    block = tl.program_id(0) % (Q_BLOCKS + 2 * KV_BLOCKS)
    row = (tl.program_id(0) // (Q_BLOCKS + 2 * KV_BLOCKS)).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    angle = row
    if HAS_POSITIONS:
        angle = tl.load(positions_ptr + row)
    cos_at, sin_at = cos_ptr + angle * cos_row_stride, sin_ptr + angle * sin_row_stride
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    tail_columns = ROTARY_DIM + tl.arange(0, BLOCK_TAIL)[None, :]
    in_half, in_tail = columns < HALF, tail_columns < HEAD_DIM
    # fmt: off
    if block < Q_BLOCKS:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        is_head = head < NUM_HEADS
        first, second, tail = _turned_heads(
            qkv_ptr + row * qkv_row_stride + head * HEAD_DIM, is_head, cos_at, sin_at, q_weight_ptr, eps,
            HEAD_DIM, ROTARY_DIM, BLOCK_HEADS, BLOCK_HALF, BLOCK_TAIL, HAS_NORM, IS_GEMMA, DTYPE,
        )
        is_head = is_head & (slot >= 0)
        out_at = out_ptr + row * out_row_stride + head * out_head_stride
        tl.store(out_at + columns, first.to(DTYPE), mask=is_head & in_half)
        tl.store(out_at + HALF + columns, second.to(DTYPE), mask=is_head & in_half)
        if ROTARY_DIM < HEAD_DIM:
            tl.store(out_at + tail_columns, tail.to(DTYPE), mask=is_head & in_tail)
    elif block < Q_BLOCKS + KV_BLOCKS:
        head = (block - Q_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        is_head = head < NUM_KV_HEADS
        first, second, tail = _turned_heads(
            qkv_ptr + row * qkv_row_stride + (NUM_HEADS + head) * HEAD_DIM, is_head, cos_at, sin_at, k_weight_ptr, eps,
            HEAD_DIM, ROTARY_DIM, BLOCK_HEADS, BLOCK_HALF, BLOCK_TAIL, HAS_NORM, IS_GEMMA, DTYPE,
        )
        scale = 1.0
        if HAS_SCALES:
            scale = tl.load(k_scale_ptr + head, mask=is_head, other=1.0)
        is_head = is_head & (slot >= 0)
        cache_at = k_cache_ptr + page * k_page_stride + offset * k_slot_stride + head.to(tl.int64) * k_head_stride
        _store_quantised(cache_at + columns, first, is_head & in_half, scale, HAS_SCALES, DTYPE)
        _store_quantised(cache_at + HALF + columns, second, is_head & in_half, scale, HAS_SCALES, DTYPE)
        if ROTARY_DIM < HEAD_DIM:
            _store_quantised(cache_at + tail_columns, tail, is_head & in_tail, scale, HAS_SCALES, DTYPE)
    else:
        head = (block - Q_BLOCKS - KV_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        dims = tl.arange(0, BLOCK_DIM)[None, :]
        is_value = (head < NUM_KV_HEADS) & (dims < HEAD_DIM)
        value_at = qkv_ptr + row * qkv_row_stride + (NUM_HEADS + NUM_KV_HEADS + head) * HEAD_DIM + dims
        value = tl.load(value_at, mask=is_value, other=0.0, eviction_policy="evict_first")
        scale = 1.0
        if HAS_SCALES:
            scale = tl.load(v_scale_ptr + head, mask=head < NUM_KV_HEADS, other=1.0)
        cache_at = v_cache_ptr + page * v_page_stride + offset * v_slot_stride + head.to(tl.int64) * v_head_stride
        _store_quantised(cache_at + dims, value, is_value & (slot >= 0), scale, HAS_SCALES, DTYPE)
    # fmt: on


def launch_rope_append(
    qkv: Tensor,
    rotation: Rotation,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping_T: Tensor,
    out: Tensor,
    positions_T: Tensor | None,
    norm: QkNorm | None,
    scales: KvScales | None,
    *,
    heads_per_program: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Run the kernel on arguments that `rope_append` has checked; queries go to `out [T, H, D]`.

    `heads_per_program` is a power of two. None for it and `num_warps`: 1024 elements of a program, 16 of a thread.
    """
    num_rows, num_heads, head_dim = out.shape
    if num_rows == 0:
        return
    num_kv_heads, page_size = k_cache.shape[1:3]
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = heads_per_program or max(1, _TILE_ELEMENTS // block_dim)
    blocks_per_row = triton.cdiv(num_heads, block_heads) + 2 * triton.cdiv(num_kv_heads, block_heads)
    _rope_append[(num_rows * blocks_per_row,)](
        qkv,
        rotation.cos_T1D,
        rotation.sin_T1D,
        slot_mapping_T if positions_T is None else positions_T,
        slot_mapping_T,
        qkv if norm is None else norm.q_weight_D,
        qkv if norm is None else norm.k_weight_D,
        qkv if scales is None else scales.k_scale_K,
        qkv if scales is None else scales.v_scale_K,
        out,
        k_cache,
        v_cache,
        qkv.stride(0),
        *(angle.stride(0) for angle in (rotation.cos_T1D, rotation.sin_T1D)),
        *(*out.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        0.0 if norm is None else norm.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotation.cos_T1D.shape[-1],
        PAGE_SIZE=page_size,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=block_dim,
        BLOCK_HALF=triton.next_power_of_2(max(rotation.cos_T1D.shape[-1] // 2, 1)),
        BLOCK_TAIL=triton.next_power_of_2(max(head_dim - rotation.cos_T1D.shape[-1], 1)),
        HAS_POSITIONS=positions_T is not None,
        HAS_NORM=norm is not None,
        IS_GEMMA=norm is not None and norm.is_gemma,
        HAS_SCALES=scales is not None,
        HAS_EARLY_START=has_early_start(qkv.device),
        launch_pdl=has_early_start(qkv.device),
        num_warps=num_warps or max(1, min(block_heads * block_dim // 512, 8)),
    )
