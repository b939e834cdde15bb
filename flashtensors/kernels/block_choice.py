"""What `sampling_kernel` does with whole blocks of logits: draw by weight, find the peak, bound a top-k, list them.

Shapes: arguments named `blocks`, `weights` and `peaks` are vectors over all blocks of a row.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportUnboundVariable=false
# pyright: reportPossiblyUnboundVariable=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import triton
import triton.language as tl

from .block_stats import BLOCK
from .token_search import NUM_PIVOTS, load_blocks, weigh

_BOUND_PASSES = tl.constexpr(3)
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def pick_by_blocks(logits_row_ptr, blocks, weights, peak, scale, min_p, fraction, vocab_size):
    """Draw by id: the block at which float64 `weights` of blocks summed pass a fraction of them all, then the token."""
    cumulative = tl.cumsum(weights, axis=0)
    target = fraction * tl.max(cumulative, axis=0)
    last_block = tl.max(tl.where(weights > 0.0, blocks, 0), axis=0)
    block = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), axis=0), last_block)
    before = tl.max(tl.where(blocks < block, cumulative, 0.0), axis=0)
    token_ids = block * _BLOCK + tl.arange(0, _BLOCK)
    logits = tl.load(logits_row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    token_weights = weigh(logits, peak, scale)
    token_weights = tl.where(token_weights >= min_p, token_weights, 0.0).to(tl.float64)
    is_past = (token_weights > 0.0) & (before + tl.cumsum(token_weights, axis=0) > target)
    first = tl.min(tl.where(is_past, token_ids, vocab_size), axis=0)
    last = tl.max(tl.where(token_weights > 0.0, token_ids, 0), axis=0)
    return tl.where(first < vocab_size, first, last)


@triton.jit
def find_peak(logits_row_ptr, blocks, peaks, peak, vocab_size):
    """The first token whose logit is `peak`."""
    block = tl.min(tl.where(peaks == peak, blocks, vocab_size), axis=0)
    token_ids = block * _BLOCK + tl.arange(0, _BLOCK)
    logits = tl.load(logits_row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(logits == peak, token_ids, vocab_size), axis=0)


@triton.jit
def bound_top_k(peaks, peak, top_k):
    """A logit that none of the k largest is below, as k blocks peak there or above; -inf where fewer blocks do."""
    is_live = peaks > float("-inf")
    bound = tl.min(tl.where(is_live, peaks, peak), axis=0)
    step = (peak - bound) / NUM_PIVOTS
    pivot_index = tl.arange(0, NUM_PIVOTS)
    for _ in tl.static_range(_BOUND_PASSES):
        pivots = bound + pivot_index * step
        num_above = tl.sum((peaks[None, :] >= pivots[:, None]).to(tl.int32), axis=1)
        num_reaching = tl.sum((num_above >= top_k).to(tl.int32), axis=0)
        bound += tl.maximum(num_reaching - 1, 0) * step
        step = step / NUM_PIVOTS
    num_above = tl.sum((is_live & (peaks >= bound)).to(tl.int32), axis=0)
    return tl.where(num_above >= top_k, bound, float("-inf"))


@triton.jit
def list_blocks(list_ptr, blocks, is_listed):
    """Write the blocks in order, and return how many there are."""
    is_listed = is_listed.to(tl.int32)
    tl.store(list_ptr + tl.cumsum(is_listed, axis=0) - 1, blocks, mask=is_listed > 0)
    tl.debug_barrier()
    return tl.sum(is_listed, axis=0)


# fmt: off
@triton.jit
def weigh_blocks(
    logits_row_ptr, list_ptr, num_listed, weights_row_ptr, blocks, is_block, peak, scale, min_p, vocab_size,
    TILE_BLOCKS: tl.constexpr,
):
    """float64 weights of blocks without tokens below min-p; those not listed have none."""
    tl.store(weights_row_ptr + blocks, tl.zeros_like(blocks).to(tl.float32), mask=is_block)
    tl.debug_barrier()
    for start in tl.range(0, num_listed, TILE_BLOCKS):
        is_listed, tile, _, logits = load_blocks(
            logits_row_ptr, list_ptr, start, num_listed, vocab_size, TILE_BLOCKS, _BLOCK
        )
        weights = weigh(logits, peak, scale)
        weights = tl.sum(tl.where(weights >= min_p, weights, 0.0), axis=1)
        tl.store(weights_row_ptr + tile, weights, mask=is_listed)
    tl.debug_barrier()
    return tl.load(weights_row_ptr + blocks, mask=is_block, other=0.0).to(tl.float64)
# fmt: on
