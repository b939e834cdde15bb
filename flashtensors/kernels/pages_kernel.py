"""Triton bodies of `pages.py`.

Shapes: C caches, N pages that move, L tokens, K key-value heads, P page size, D head dim. A word is 4 bytes.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pages import CacheSet

_BLOCK_WORDS = 2048
"""Words of a page that a program moves: four 16-byte loads in flight for each of 128 threads."""


@triton.jit
def _move_pages(
    addresses_ptr,
    pages_ptr,
    source_pages_ptr,
    target_pages_ptr,
    num_caches,
    page_stride_vectors,
    PAGE_WORDS: tl.constexpr,
    IS_GATHER: tl.constexpr,
    IS_SCATTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs run over the blocks of a page, then over caches, then over pages; `pages_ptr` is the gathered form."""
    NUM_BLOCKS: tl.constexpr = (PAGE_WORDS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    words = program % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
    cache_index = program // NUM_BLOCKS % num_caches
    item = program // NUM_BLOCKS // num_caches
    source_page = tl.load(source_pages_ptr + item)
    target_page = tl.load(target_pages_ptr + item)
    is_moved = (words < PAGE_WORDS) & (source_page >= 0) & (target_page >= 0)
    cache = tl.multiple_of(tl.load(addresses_ptr + cache_index).to(tl.pointer_type(tl.int32)), 16)
    source = cache + source_page * page_stride_vectors * 4  # 4 words a vector: alignment shows
    target = cache + target_page * page_stride_vectors * 4
    gathered = pages_ptr + (item.to(tl.int64) * num_caches + cache_index) * PAGE_WORDS
    if IS_GATHER:
        target = gathered
    if IS_SCATTER:
        source = gathered
    tl.store(target + words, tl.load(source + words, mask=is_moved, eviction_policy="evict_first"), mask=is_moved)


@triton.jit
def _move_tokens(
    cache_ptr,
    tokens_ptr,
    slots_ptr,
    cache_page_stride,
    cache_head_stride,
    cache_slot_stride,
    token_stride,
    token_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    IS_SCATTER: tl.constexpr,
):
    """A program moves a few heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    is_moved = (head < NUM_KV_HEADS) & (dims < HEAD_DIM) & (slot >= 0)
    cache_at = cache_ptr + slot // PAGE_SIZE * cache_page_stride + slot % PAGE_SIZE * cache_slot_stride
    cache_at += head.to(tl.int64) * cache_head_stride + dims
    token_at = tokens_ptr + token * token_stride + head.to(tl.int64) * token_head_stride + dims
    if IS_SCATTER:
        tl.store(cache_at, tl.load(token_at, mask=is_moved), mask=is_moved)
    else:
        tl.store(token_at, tl.load(cache_at, mask=is_moved), mask=is_moved)


def launch_copy_pages(
    cache_set: CacheSet, source_pages_N: Tensor, target_pages_N: Tensor, *, block: int = _BLOCK_WORDS
) -> None:
    """Copy pages to pages in every cache; arguments as `copy_pages` has checked them."""
    _launch(cache_set, cache_set.addresses_C, source_pages_N, target_pages_N, block=block)


def launch_gather_pages(cache_set: CacheSet, pages_N: Tensor, out: Tensor, *, block: int = _BLOCK_WORDS) -> None:
    """Pages of every cache to `out [N, C, K, P, D]`."""
    _launch(cache_set, out.view(torch.int32), pages_N, pages_N, is_gather=True, block=block)


def launch_scatter_pages(
    pages_NCKPD: Tensor, cache_set: CacheSet, pages_N: Tensor, *, block: int = _BLOCK_WORDS
) -> None:
    """What `launch_gather_pages` gave to pages of every cache."""
    _launch(cache_set, pages_NCKPD.view(torch.int32), pages_N, pages_N, is_scatter=True, block=block)


def launch_move_tokens(cache: Tensor, slots_L: Tensor, tokens_LKD: Tensor, *, is_scatter: bool) -> None:
    """Tokens at slots of one cache to `tokens_LKD`, or the other way."""
    num_tokens, num_kv_heads, head_dim = tokens_LKD.shape
    if tokens_LKD.numel() == 0:
        return
    if cache.itemsize == 1:  # moves as it is
        cache, tokens_LKD = cache.view(torch.int8), tokens_LKD.view(torch.int8)
    block_dim = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(num_kv_heads), max(1, 2048 // block_dim))
    _move_tokens[(num_tokens, triton.cdiv(num_kv_heads, block_heads))](
        cache,
        tokens_LKD,
        slots_L,
        cache.stride(0),
        cache.stride(1),
        cache.stride(2),
        tokens_LKD.stride(0),
        tokens_LKD.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=cache.shape[2],
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=block_dim,
        IS_SCATTER=is_scatter,
        num_warps=max(1, min(block_heads * block_dim // 512, 4)),
    )


def _launch(
    cache_set: CacheSet,
    pages: Tensor,
    source_pages_N: Tensor,
    target_pages_N: Tensor,
    *,
    is_gather: bool = False,
    is_scatter: bool = False,
    block: int,
) -> None:
    first, num_caches = cache_set.caches[0], len(cache_set.caches)
    page_words = first[:1].numel() * first.itemsize // 4
    num_programs = source_pages_N.numel() * num_caches * triton.cdiv(page_words, block)
    if num_programs == 0:
        return
    _move_pages[(num_programs,)](
        cache_set.addresses_C,
        pages,
        source_pages_N,
        target_pages_N,
        num_caches,
        first.stride(0) * first.itemsize // 16,
        PAGE_WORDS=page_words,
        IS_GATHER=is_gather,
        IS_SCATTER=is_scatter,
        BLOCK=block,
    )
