"""Finding thresholds among the logits of one row without sorting them; Triton bodies that other kernels call.

Logits become integer keys of the same order. A threshold is the largest key `t` whose tail, all tokens with a key of
at least `t`, counts or weighs enough; it is found by narrowing an interval of keys 16-fold a pass. A pass reads only
the tokens in a *list*: positions of the list stand for ascending token ids, in granules of `1 << shift` neighbours.

A row may be cut into *bins* of equal width below its peak, so that a list need hold only those where a threshold lies.

All sums run in one order that depends on the row alone, so a row's result is bitwise the same in any batch.

A short list needs no passes: `draw_ranked` compares each token with each.

Shapes: L positions of a list, W = 16 pivots.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (parameters of Triton bodies have no Python types)

from __future__ import annotations

import triton
import triton.language as tl

NUM_PIVOTS = tl.constexpr(16)
"""W: how many parts a pass divides an interval into."""


@triton.jit
def to_key(logits, KEY_SHIFT: tl.constexpr):
    """Order-preserving int32 of fp32 logits; `KEY_SHIFT` low bits are those that the logits' own dtype lacks."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> KEY_SHIFT


@triton.jit
def to_logit(key, KEY_SHIFT: tl.constexpr):
    """The fp32 logit of a key."""
    bits = key << KEY_SHIFT
    bits = tl.where(key < 0, (bits | ((1 << KEY_SHIFT) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weigh(logits, peak, scale):
    """`exp((l - peak) / temperature)` with `scale = log2(e) / temperature`."""
    return tl.exp2((logits - peak) * scale)


@triton.jit
def bin_of(logits, peak, factor):
    """Which bin below the peak a logit falls into; with a factor of 0 all fall into the first, and -inf into none."""
    return tl.where(logits > float("-inf"), tl.minimum((peak - logits) * factor, 1e9), 2e9).to(tl.int32)


# fmt: off
@triton.jit
def load_listed(
    logits_ptr, list_ptr, start, length, shift, vocab_size, peak, factor, first_bin, last_bin, TILE: tl.constexpr
):
    """Ids and fp32 logits of list positions `start … start + TILE - 1`, and which are tokens of the bins looked at."""
    # fmt: on
    position = start + tl.arange(0, TILE)
    is_listed = position < length
    granule = tl.load(list_ptr + (position >> shift), mask=is_listed, other=0)
    token_ids = (granule << shift) + (position & ((1 << shift) - 1))
    is_token = is_listed & (token_ids < vocab_size)
    logits = tl.load(logits_ptr + token_ids, mask=is_token, other=float("-inf")).to(tl.float32)
    bins = bin_of(logits, peak, factor)
    return token_ids, logits, is_token & (bins >= first_bin) & (bins <= last_bin)


# fmt: off
@triton.jit
def find_threshold(
    logits_ptr, list_ptr, length, shift, vocab_size, peak, scale, factor, first_bin, last_bin, base, low, high, goal,
    BY_MASS: tl.constexpr, IS_STRICT: tl.constexpr, KEY_SHIFT: tl.constexpr, TILE: tl.constexpr,
):
    """The largest key in [low, high) whose tail reaches `goal`, and the size of what lies above it.

    `BY_MASS` sizes tails by weight, else by count. `IS_STRICT` asks for more than the goal. Only tokens of the bins
    are counted, and `base` stands for what lies above them. The tail of `low` is taken to reach the goal, and that of
    `high` to hold nothing but the base. `low`, `high` are int64, `base` and sizes float64.
    """
    above = base
    pivot_index = tl.arange(0, NUM_PIVOTS)
    while high - low > 1:
        step = (high - low + NUM_PIVOTS - 1) // NUM_PIVOTS
        pivots = tl.minimum(low + (pivot_index + 1) * step, high)
        pivot_keys = pivots.to(tl.int32)
        tail = tl.zeros([NUM_PIVOTS], dtype=tl.float64) + base
        for start in tl.range(0, length, TILE):
            _, logits, is_token = load_listed(
                logits_ptr, list_ptr, start, length, shift, vocab_size, peak, factor, first_bin, last_bin, TILE
            )
            in_tail = (to_key(logits, KEY_SHIFT)[None, :] >= pivot_keys[:, None]) & is_token[None, :]
            if BY_MASS:
                tail += tl.sum(tl.where(in_tail, weigh(logits, peak, scale)[None, :], 0.0), axis=1).to(tl.float64)
            else:
                tail += tl.sum(in_tail.to(tl.int32), axis=1).to(tl.float64)
        reaches = (tail > goal if IS_STRICT else tail >= goal) & (pivots < high)
        num_reaching = tl.sum(reaches.to(tl.int32), axis=0)
        next_high = low + (num_reaching + 1) * step
        if next_high < high:
            above = tl.sum(tl.where(pivot_index == num_reaching, tail, 0.0), axis=0)
            high = next_high
        low += num_reaching * step
    return low, above


@triton.jit
def mass_above(
    logits_ptr, list_ptr, length, shift, vocab_size, peak, scale, factor, first_bin, last_bin, base, key, min_p,
    KEY_SHIFT: tl.constexpr, TILE: tl.constexpr,
):
    """`base` and the weight of tokens above `key` that weigh at least `min_p`, and how many have just that key."""
    mass = base
    num_equal = tl.full([], 0, tl.int32)
    for start in tl.range(0, length, TILE):
        _, logits, is_token = load_listed(
            logits_ptr, list_ptr, start, length, shift, vocab_size, peak, factor, first_bin, last_bin, TILE
        )
        keys = to_key(logits, KEY_SHIFT)
        weights = weigh(logits, peak, scale)
        is_kept = is_token & (keys > key) & (weights >= min_p)
        mass += tl.sum(tl.where(is_kept, weights, 0.0), axis=0).to(tl.float64)
        num_equal += tl.sum((is_token & (keys == key)).to(tl.int32), axis=0)
    return mass, num_equal


@triton.jit
def find_equal(
    logits_ptr, list_ptr, length, shift, vocab_size, key, rank, KEY_SHIFT: tl.constexpr, TILE: tl.constexpr
):
    """The id of the token numbered `rank`, by id from 0, among those with this key; or else their last; -1: none."""
    found = tl.full([], -1, tl.int32)
    num_before = tl.full([], 0, tl.int32)
    for start in tl.range(0, length, TILE):
        token_ids, logits, is_token = load_listed(
            logits_ptr, list_ptr, start, length, shift, vocab_size, 0.0, 0.0, 0, 0, TILE
        )
        is_equal = (is_token & (to_key(logits, KEY_SHIFT) == key)).to(tl.int32)
        ranks = num_before + tl.cumsum(is_equal, axis=0) - 1
        found = tl.maximum(found, tl.max(tl.where((is_equal > 0) & (ranks <= rank), token_ids, -1), axis=0))
        num_before += tl.sum(is_equal, axis=0)
    return found


@triton.jit
def load_blocks(
    logits_ptr, block_list_ptr, start, num_listed, vocab_size, TILE_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Listed blocks `start … start + TILE_BLOCKS - 1`: which are listed, their ids, and tokens' ids and fp32 logits.

    -inf past the end of the list or of the vocabulary.
    """
    index = start + tl.arange(0, TILE_BLOCKS)
    is_listed = index < num_listed
    blocks = tl.load(block_list_ptr + index, mask=is_listed, other=0)
    token_ids = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_token = is_listed[:, None] & (token_ids < vocab_size)
    logits = tl.load(logits_ptr + token_ids, mask=is_token, other=float("-inf")).to(tl.float32)
    return is_listed, blocks, token_ids, logits


@triton.jit
def _append(out_ptr, num_before, token_ids, is_found, CAPACITY: tl.constexpr):
    """Write found ids of a tile of blocks behind `num_before` others, in order; returns how many there are then."""
    per_block = tl.sum(is_found, axis=1)
    before = num_before + tl.cumsum(per_block, axis=0) - per_block
    position = before[:, None] + tl.cumsum(is_found, axis=1) - 1
    tl.store(out_ptr + position, token_ids, mask=(is_found > 0) & (position < CAPACITY))
    return num_before + tl.sum(per_block, axis=0)


@triton.jit
def list_tokens(
    logits_ptr, block_list_ptr, num_listed, vocab_size, bound, peak, factor, first_bin, last_bin,
    second_first_bin, second_last_bin, out_ptr, second_out_ptr,
    CAPACITY: tl.constexpr, TILE_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Write ids of tokens with a logit of at least `bound`, in order, for two ranges of bins; returns their numbers.

    No more than `CAPACITY` are written.
    """
    num_first = tl.full([], 0, tl.int32)
    num_second = tl.full([], 0, tl.int32)
    for start in tl.range(0, num_listed, TILE_BLOCKS):
        _, _, token_ids, logits = load_blocks(
            logits_ptr, block_list_ptr, start, num_listed, vocab_size, TILE_BLOCKS, BLOCK
        )
        bins = bin_of(logits, peak, factor)
        is_first = (logits >= bound) & (bins >= first_bin) & (bins <= last_bin)
        num_first = _append(out_ptr, num_first, token_ids, is_first.to(tl.int32), CAPACITY)
        if second_first_bin <= second_last_bin:
            is_second = (logits >= bound) & (bins >= second_first_bin) & (bins <= second_last_bin)
            num_second = _append(second_out_ptr, num_second, token_ids, is_second.to(tl.int32), CAPACITY)
    return num_first, num_second
@triton.jit
def draw_ranked(
    logits_ptr, list_ptr, length, peak, scale, top_k, top_p, min_p, fraction,
    CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):
    """Draw from a list of at most `CAPACITY` tokens that holds the top-k, by comparing each with each.

    Returns the token, the weight of what is kept, and the smallest kept logit with the last id that has it.
    """
    position = tl.arange(0, CAPACITY)
    is_token = position < length
    token_ids = tl.load(list_ptr + position, mask=is_token, other=0)
    logits = tl.load(logits_ptr + token_ids, mask=is_token, other=float("-inf")).to(tl.float32)
    weights = weigh(logits, peak, scale)
    rank = tl.zeros([CAPACITY], dtype=tl.int32)
    before = tl.zeros([CAPACITY], dtype=tl.float32)
    for start in tl.range(0, length, CHUNK):
        others = start + tl.arange(0, CHUNK)
        other_ids = tl.load(list_ptr + others, mask=others < length, other=0)
        other_logits = tl.load(logits_ptr + other_ids, mask=others < length, other=float("-inf")).to(tl.float32)
        is_equal_before = (other_logits[None, :] == logits[:, None]) & (others[None, :] < position[:, None])
        is_before = (other_logits[None, :] > logits[:, None]) | is_equal_before
        rank += tl.sum(is_before.to(tl.int32), axis=1)
        before += tl.sum(tl.where(is_before, weigh(other_logits, peak, scale)[None, :], 0.0), axis=1)
    is_kept = is_token & (rank < top_k)
    goal = top_p * tl.sum(tl.where(is_kept, weights, 0.0), axis=0)
    goal = tl.where(top_p < 1.0, goal, float("inf"))
    is_kept = is_kept & (before < goal) & (weights >= min_p)
    mass = tl.sum(tl.where(is_kept, weights, 0.0), axis=0).to(tl.float64)
    is_passed = is_kept & (weights > 0.0) & (before <= fraction * mass)
    drawn_rank = tl.max(tl.where(is_passed, rank, 0), axis=0)
    token_id = tl.max(tl.where(is_token & (rank == drawn_rank), token_ids, 0), axis=0)
    cut_value = tl.min(tl.where(is_kept, logits, float("inf")), axis=0)
    cut_token_id = tl.max(tl.where(is_kept & (logits == cut_value), token_ids, 0), axis=0)
    return token_id, mass, cut_value, cut_token_id
# fmt: on


@triton.jit
def uniform(seed, position):
    """The same float64 in [0, 1) as `sampling.uniform`: SplitMix64 (Steele, Lea, Flood 2014) at a counter."""
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    state = _mix64(seed.to(tl.uint64, bitcast=True) + golden) + (position + 1).to(tl.uint64, bitcast=True) * golden
    return (_mix64(state) >> 12).to(tl.float64) * 2.220446049250313e-16


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)
