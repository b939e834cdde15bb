"""Sampling on a GPU: the draws of `sampling.py` from the same uniforms, without a sort, in three launches for any rows.

1. Peak and weight of every block of 128 neighbouring logits, over as many programs as fill the device. For most rows
   this is the only pass over all logits.
2. For rows with top-p and without top-k, a histogram of weights (`mass_histogram`); other rows pass.
3. One program a row. A row that is greedy or only has a temperature or min-p goes by the blocks' weights to one block
   and picks in it. Of others the likeliest tokens are listed: with top-k, those above the k-th largest peak of a
   block, which bounds the k-th largest logit from below; with top-p alone, those of the histogram's bins in which the
   nucleus ends and the drawn token lies. `token_search` finds thresholds among them.

Only blocks that peak high enough are read again. Rows of which more than `LIST_CAPACITY` tokens would be listed (a
top-k near the number of blocks or above it, or that many equal logits) read blocks several times, and take a
millisecond. Sums differ from the CPU's in their last bits, so about one draw in a million is another token than there.

Shapes: S rows, V vocabulary, B blocks, N stop ids, W pivots.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportUnboundVariable=false
# pyright: reportPossiblyUnboundVariable=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import triton
import triton.language as tl

from .block_choice import bound_top_k, find_peak, list_blocks, pick_by_blocks, weigh_blocks
from .block_stats import BLOCK, BLOCK_SHIFT, temperature_scale
from .mass_histogram import NUM_BINS, bin_masses, has_nucleus_alone
from .token_search import (
    draw_ranked,
    find_equal,
    find_threshold,
    list_tokens,
    mass_above,
    to_key,
    to_logit,
    uniform,
    weigh,
)

LIST_CAPACITY = 4096
"""Most tokens that are listed one by one; longer lists stay lists of blocks."""

RANKED_CAPACITY = 256
"""Most tokens that are compared each with each."""

_BOUND_PASSES = tl.constexpr(3)
_BLOCK_SHIFT = tl.constexpr(BLOCK_SHIFT)
_BLOCK = tl.constexpr(BLOCK)
_LIST_CAPACITY = tl.constexpr(LIST_CAPACITY)
_RANKED_CAPACITY = tl.constexpr(RANKED_CAPACITY)
_NUM_BINS = tl.constexpr(NUM_BINS)


@triton.jit(do_not_specialize=["num_stop_ids"])  # batches differ in it
def choose(
    logits_ptr,
    peak_ptr,
    mass_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    stop_ids_ptr,
    histogram_ptr,
    width_ptr,
    lists_ptr,
    weights_ptr,
    token_ids_ptr,
    is_valid_ptr,
    is_finished_ptr,
    cut_peak_ptr,
    cut_mass_ptr,
    cut_value_ptr,
    cut_token_id_ptr,
    vocab_size,
    num_blocks,
    row_stride,
    num_stop_ids,
    STOP_IDS_PAD: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    HAS_HISTOGRAM: tl.constexpr,
    HAS_CUTS: tl.constexpr,
):
    """Draw one row's token from its blocks' stats; a STOP_IDS_PAD of 0: nobody asks for stop ids."""
    row = tl.program_id(0).to(tl.int64)
    vocab_size += tl.full([], 0, tl.int32)  # a vocabulary of one token would be a constant
    logits_row_ptr = logits_ptr + row * row_stride
    blocks = tl.arange(0, BLOCKS_PAD)
    is_block = blocks < num_blocks
    peaks = tl.load(peak_ptr + row * num_blocks + blocks, mask=is_block, other=float("-inf"))
    masses = tl.load(mass_ptr + row * num_blocks + blocks, mask=is_block, other=0.0)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    fraction = uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row))
    top_k = tl.where(top_k < vocab_size, top_k, 0).to(tl.int32)
    scale = temperature_scale(temperature)
    peak = tl.max(peaks, axis=0)
    weights = masses * weigh(peaks, peak, scale)
    total = tl.sum(weights.to(tl.float64), axis=0)
    is_valid = (peak > float("-inf")) & (peak < float("inf")) & (total == total)
    is_truncated = (top_k > 0) | (top_p < 1.0)

    token_id = tl.full([], 0, tl.int32)
    kept_mass = total
    cut_value = tl.full([], float("-inf"), tl.float32)
    cut_token_id = vocab_size
    block_list_ptr = lists_ptr + row * (num_blocks + 2 * _LIST_CAPACITY)
    # fmt: off
    if is_valid:
        if temperature <= 0.0:
            token_id = find_peak(logits_row_ptr, blocks, peaks, peak, vocab_size)
            kept_mass = tl.full([], 1.0, tl.float64)
            cut_value = peak
            cut_token_id = token_id
        elif is_truncated == 0:
            block_weights = weights.to(tl.float64)
            if min_p > 0.0:
                bound = peak + (tl.log2(min_p) - 1e-3) / scale  # a little below, so that rounding loses no token
                num_listed = list_blocks(block_list_ptr, blocks, is_block & (peaks >= bound))
                block_weights = weigh_blocks(
                    logits_row_ptr, block_list_ptr, num_listed, weights_ptr + row * num_blocks, blocks, is_block,
                    peak, scale, min_p, vocab_size, TILE_BLOCKS,
                )
                kept_mass = tl.sum(block_weights, axis=0)
            token_id = pick_by_blocks(logits_row_ptr, blocks, block_weights, peak, scale, min_p, fraction, vocab_size)
        else:
            # What to list: all tokens above a bound, or one range of bins for the cut and one for the drawn token.
            factor = tl.full([], 0.0, tl.float32)
            cut_bin = tl.full([], 0, tl.int32)
            first_bin = tl.full([], 1, tl.int32)
            last_bin = tl.full([], 0, tl.int32)
            cut_base = tl.full([], 0.0, tl.float64)
            draw_base = tl.full([], 0.0, tl.float64)
            bin_height = tl.full([], 0.0, tl.float32)
            goal = top_p * total
            if HAS_HISTOGRAM and has_nucleus_alone(temperature, top_k, top_p, vocab_size):
                width = tl.load(width_ptr + row)
                factor = scale / width
                bin_height = width / scale
                bins = tl.arange(0, _NUM_BINS)
                in_bin = bin_masses(histogram_ptr + row * _NUM_BINS, bins, width)
                cumulative = tl.cumsum(in_bin, axis=0)
                cut_bin = tl.minimum(tl.sum((cumulative < goal).to(tl.int32), axis=0), _NUM_BINS - 1)
                if min_p > 0.0:  # the nucleus may go on below min-p, but what is kept does not
                    cut_bin = tl.minimum(cut_bin, tl.minimum(-tl.log2(min_p) / width + 0.01, 1e9).to(tl.int32))
                cut_base = tl.sum(tl.where(bins < cut_bin, in_bin, 0.0), axis=0)
                cut_end = tl.sum(tl.where(bins <= cut_bin, in_bin, 0.0), axis=0)
                # What is kept weighs something in between, so the drawn token lies in one of these.
                first_bin = tl.sum((cumulative <= fraction * cut_base * (1 - 1e-6)).to(tl.int32), axis=0)
                last_bin = tl.sum((cumulative <= fraction * cut_end * (1 + 1e-6)).to(tl.int32), axis=0)
                first_bin = tl.minimum(first_bin, cut_bin)
                last_bin = tl.minimum(last_bin, cut_bin)
                draw_base = tl.sum(tl.where(bins < first_bin, in_bin, 0.0), axis=0)
                bound = peak - (cut_bin + 1.01) * bin_height
            else:
                bound = bound_top_k(peaks, peak, top_k)
            num_listed = list_blocks(block_list_ptr, blocks, is_block & (peaks >= bound))
            cut_list_ptr = block_list_ptr + num_blocks
            draw_list_ptr = cut_list_ptr + _LIST_CAPACITY
            cut_length, draw_length = list_tokens(
                logits_row_ptr, block_list_ptr, num_listed, vocab_size, bound, peak, factor, cut_bin, cut_bin,
                first_bin, last_bin, cut_list_ptr, draw_list_ptr, _LIST_CAPACITY, TILE_BLOCKS, _BLOCK,
            )
            tl.debug_barrier()
            if (top_k > 0) & (cut_length <= _RANKED_CAPACITY):
                token_id, kept_mass, cut_value, cut_token_id = draw_ranked(
                    logits_row_ptr, cut_list_ptr, cut_length, peak, scale, top_k, top_p, min_p, fraction,
                    _RANKED_CAPACITY, 32,
                )
            else:
                cut_shift = tl.full([], 0, tl.int32)
                draw_shift = tl.full([], 0, tl.int32)
                if cut_length > _LIST_CAPACITY:
                    cut_list_ptr, cut_length = block_list_ptr, num_listed * _BLOCK
                    cut_shift = tl.full([], _BLOCK_SHIFT, tl.int32)
                if draw_length > _LIST_CAPACITY:
                    draw_list_ptr, draw_length = block_list_ptr, num_listed * _BLOCK
                    draw_shift = tl.full([], _BLOCK_SHIFT, tl.int32)

                top = to_key(peak, KEY_SHIFT).to(tl.int64) + 1
                cut = to_key(bound, KEY_SHIFT).to(tl.int64)
                cut_top = tl.minimum(to_key(peak - (cut_bin - 0.01) * bin_height, KEY_SHIFT).to(tl.int64) + 1, top)
                most_ties = tl.full([], 1 << 30, tl.int32)
                if top_k > 0:
                    cut, above = find_threshold(
                        logits_row_ptr, cut_list_ptr, cut_length, cut_shift, vocab_size, peak, scale, factor, cut_bin,
                        cut_bin, cut_base, cut, cut_top, top_k, False, False, KEY_SHIFT, TILE,
                    )
                    most_ties = top_k - above.to(tl.int32)
                    if top_p < 1.0:
                        mass, _ = mass_above(
                            logits_row_ptr, cut_list_ptr, cut_length, cut_shift, vocab_size, peak, scale, factor,
                            cut_bin, cut_bin, cut_base, cut.to(tl.int32), 0.0, KEY_SHIFT, TILE,
                        )
                        goal = top_p * (mass + most_ties * weigh(to_logit(cut.to(tl.int32), KEY_SHIFT), peak, scale))
                if top_p < 1.0:
                    top_k_cut = cut
                    cut, above = find_threshold(
                        logits_row_ptr, cut_list_ptr, cut_length, cut_shift, vocab_size, peak, scale, factor, cut_bin,
                        cut_bin, cut_base, cut, cut_top, goal, True, False, KEY_SHIFT, TILE,
                    )
                    tie_weight = weigh(to_logit(cut.to(tl.int32), KEY_SHIFT), peak, scale).to(tl.float64)
                    ties = tl.minimum(tl.ceil((goal - above) / tl.maximum(tie_weight, 1e-45)), 1e9)
                    ties = tl.maximum(ties, 1.0).to(tl.int32)
                    most_ties = tl.where(cut > top_k_cut, ties, tl.minimum(most_ties, ties))
                cut_key = cut.to(tl.int32)
                kept_mass, num_ties = mass_above(
                    logits_row_ptr, cut_list_ptr, cut_length, cut_shift, vocab_size, peak, scale, factor, cut_bin,
                    cut_bin, cut_base, cut_key, min_p, KEY_SHIFT, TILE,
                )
                num_ties = tl.minimum(num_ties, most_ties)
                cut_value = to_logit(cut_key, KEY_SHIFT)
                cut_weight = weigh(cut_value, peak, scale)
                if cut_weight >= min_p:
                    kept_mass += num_ties * cut_weight.to(tl.float64)
                if HAS_CUTS:
                    cut_token_id = find_equal(
                        logits_row_ptr, cut_list_ptr, cut_length, cut_shift, vocab_size, cut_key, num_ties - 1,
                        KEY_SHIFT, TILE,
                    )

                low, high = cut, top
                if first_bin <= last_bin:
                    low = tl.maximum(cut, to_key(peak - (last_bin + 1.01) * bin_height, KEY_SHIFT).to(tl.int64))
                    high = tl.minimum(to_key(peak - (first_bin - 0.01) * bin_height, KEY_SHIFT).to(tl.int64) + 1, top)
                else:
                    draw_list_ptr, draw_length, draw_shift = cut_list_ptr, cut_length, cut_shift
                    first_bin, last_bin = cut_bin, cut_bin
                target = fraction * kept_mass
                drawn, above = find_threshold(
                    logits_row_ptr, draw_list_ptr, draw_length, draw_shift, vocab_size, peak, scale, factor, first_bin,
                    last_bin, draw_base, low, high, target, True, True, KEY_SHIFT, TILE,
                )
                drawn_key = drawn.to(tl.int32)
                drawn_weight = weigh(to_logit(drawn_key, KEY_SHIFT), peak, scale).to(tl.float64)
                rank = tl.minimum((target - above) / tl.maximum(drawn_weight, 1e-45), 1e9).to(tl.int32)
                rank = tl.where(drawn == cut, tl.minimum(rank, num_ties - 1), rank)
                token_id = find_equal(
                    logits_row_ptr, draw_list_ptr, draw_length, draw_shift, vocab_size, drawn_key, rank, KEY_SHIFT, TILE
                )
                if token_id < 0:  # rounding put the target past all that is kept
                    token_id = find_peak(logits_row_ptr, blocks, peaks, peak, vocab_size)
    # fmt: on

    tl.store(token_ids_ptr + row, token_id)
    tl.store(is_valid_ptr + row, is_valid)
    if STOP_IDS_PAD > 0:
        stops = tl.arange(0, STOP_IDS_PAD)
        stop_ids = tl.load(stop_ids_ptr + row * num_stop_ids + stops, mask=stops < num_stop_ids, other=-1)
        is_stop = (stop_ids == token_id).to(tl.int32)
        tl.store(is_finished_ptr + row, (tl.max(is_stop, axis=0) > 0) & is_valid)
    if HAS_CUTS:
        tl.store(cut_peak_ptr + row, peak)
        tl.store(cut_mass_ptr + row, kept_mass)
        tl.store(cut_value_ptr + row, cut_value)
        tl.store(cut_token_id_ptr + row, cut_token_id)
