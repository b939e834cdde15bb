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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_stats import BLOCK, BLOCK_SHIFT, KEY_SHIFTS, BlockStats, check_logits, launch_block_stats, temperature_scale
from .mass_histogram import NUM_BINS, bin_masses, has_nucleus_alone, launch_mass_histogram
from .sampling_rows import SamplingRows, require
from .token_search import (
    NUM_PIVOTS,
    draw_ranked,
    find_equal,
    find_threshold,
    list_tokens,
    load_blocks,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """What rows were drawn from: `v` has the probability `exp((l_v - peak) / temperature) / mass`, or 0.

    It is 0 where `l_v < value`, where `l_v = value` and `v > token_id`, and where the weight is below min-p.
    """

    peak_S: Tensor
    """float32."""
    mass_S: Tensor
    """float64."""
    value_S: Tensor
    """float32."""
    token_id_S: Tensor
    """int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What `launch_sample` drew."""

    token_ids_S: Tensor
    """int64; 0 where invalid."""
    is_valid_S: Tensor
    """bool; False where the largest logit is not a finite number, or one is NaN."""
    is_finished_S: Tensor
    """bool; whether the token is one of the row's stop ids."""
    stats: BlockStats
    cuts: Cuts | None


@triton.jit
def _pick_by_blocks(logits_row_ptr, blocks, weights, peak, scale, min_p, fraction, vocab_size):
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
def _find_peak(logits_row_ptr, blocks, peaks, peak, vocab_size):
    """The first token whose logit is `peak`."""
    block = tl.min(tl.where(peaks == peak, blocks, vocab_size), axis=0)
    token_ids = block * _BLOCK + tl.arange(0, _BLOCK)
    logits = tl.load(logits_row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(logits == peak, token_ids, vocab_size), axis=0)


@triton.jit
def _bound_top_k(peaks, peak, top_k):
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
def _list_blocks(list_ptr, blocks, is_listed):
    """Write the blocks in order, and return how many there are."""
    is_listed = is_listed.to(tl.int32)
    tl.store(list_ptr + tl.cumsum(is_listed, axis=0) - 1, blocks, mask=is_listed > 0)
    tl.debug_barrier()
    return tl.sum(is_listed, axis=0)


# fmt: off
@triton.jit
def _weigh_blocks(
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


@triton.jit
def _choose(
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
    NUM_STOP_IDS: tl.constexpr,
    STOP_IDS_PAD: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    TILE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    HAS_HISTOGRAM: tl.constexpr,
    HAS_CUTS: tl.constexpr,
):
    """Draw one row's token from its blocks' stats."""
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
            token_id = _find_peak(logits_row_ptr, blocks, peaks, peak, vocab_size)
            kept_mass = tl.full([], 1.0, tl.float64)
            cut_value = peak
            cut_token_id = token_id
        elif is_truncated == 0:
            block_weights = weights.to(tl.float64)
            if min_p > 0.0:
                bound = peak + (tl.log2(min_p) - 1e-3) / scale  # a little below, so that rounding loses no token
                num_listed = _list_blocks(block_list_ptr, blocks, is_block & (peaks >= bound))
                block_weights = _weigh_blocks(
                    logits_row_ptr, block_list_ptr, num_listed, weights_ptr + row * num_blocks, blocks, is_block,
                    peak, scale, min_p, vocab_size, TILE_BLOCKS,
                )
                kept_mass = tl.sum(block_weights, axis=0)
            token_id = _pick_by_blocks(logits_row_ptr, blocks, block_weights, peak, scale, min_p, fraction, vocab_size)
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
                bound = _bound_top_k(peaks, peak, top_k)
            num_listed = _list_blocks(block_list_ptr, blocks, is_block & (peaks >= bound))
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
                    token_id = _find_peak(logits_row_ptr, blocks, peaks, peak, vocab_size)
    # fmt: on

    tl.store(token_ids_ptr + row, token_id)
    tl.store(is_valid_ptr + row, is_valid)
    if NUM_STOP_IDS > 0:
        stops = tl.arange(0, STOP_IDS_PAD)
        stop_ids = tl.load(stop_ids_ptr + row * NUM_STOP_IDS + stops, mask=stops < NUM_STOP_IDS, other=-1)
        is_stop = (stop_ids == token_id).to(tl.int32)
        tl.store(is_finished_ptr + row, (tl.max(is_stop, axis=0) > 0) & is_valid)
    if HAS_CUTS:
        tl.store(cut_peak_ptr + row, peak)
        tl.store(cut_mass_ptr + row, kept_mass)
        tl.store(cut_value_ptr + row, cut_value)
        tl.store(cut_token_id_ptr + row, cut_token_id)


def launch_sample(
    logits_SV: Tensor,
    rows: SamplingRows,
    *,
    stop_ids_SN: Tensor | None = None,
    num_logprobs_S: Tensor | None = None,
    has_nuclei: bool = True,
    has_cuts: bool = False,
    stats_tile: int = 4096,
    stats_warps: int = 8,
    list_tile: int = 1024,
    blocks_tile: int = 32,
    num_warps: int = 16,
) -> Sampled:
    """Choose a token for each row; waits for nothing, so a CUDA graph may capture it.

    Args:
        logits_SV: float32, float16 or bfloat16 after bias and penalties, last stride 1.
        rows: How each row draws.
        stop_ids_SN: int32 token ids that end a row's answer, -1 for none.
        num_logprobs_S: int32; rows of 0 or more get the sums that `launch_token_logprobs` needs.
        has_nuclei: False promises that no row has top-p without top-k, and saves a launch.
        has_cuts: Whether to say what the rows were drawn from.
        stats_tile: Logits of a program of the first launch, a multiple of 128.
        stats_warps: Its warps.
        list_tile: Listed tokens that a program of the last launch reads at once.
        blocks_tile: Blocks that it reads at once.
        num_warps: Its warps.

    Raises:
        ConfigError: A tensor of another shape, dtype or device.
    """
    num_rows, vocab_size = logits_SV.shape
    device = logits_SV.device
    check_logits(logits_SV)
    rows.check(num_rows, device)
    if stop_ids_SN is not None:
        require("stop_ids_SN", stop_ids_SN, torch.int32, (num_rows, stop_ids_SN.shape[-1]), device)
    if num_logprobs_S is not None:
        require("num_logprobs_S", num_logprobs_S, torch.int32, (num_rows,), device)
    histogram = width = None
    if has_nuclei:
        histogram = torch.empty((num_rows, NUM_BINS), dtype=torch.int64, device=device)
        width = torch.empty(num_rows, dtype=torch.float32, device=device)
    stats = launch_block_stats(
        logits_SV, rows.temperature_S, num_logprobs_S, histogram, tile=stats_tile, num_warps=stats_warps
    )
    if histogram is not None and width is not None and num_rows:
        launch_mass_histogram(logits_SV, rows, stats, histogram, width)
    num_blocks = stats.peak_SB.shape[1]
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_valid = torch.empty(num_rows, dtype=torch.bool, device=device)
    num_stop_ids = 0 if stop_ids_SN is None else stop_ids_SN.shape[1]
    is_finished = torch.empty_like(is_valid) if num_stop_ids else torch.zeros_like(is_valid)
    cuts = _empty_cuts(num_rows, device) if has_cuts else None
    if num_rows:
        lists = torch.empty((num_rows, num_blocks + 2 * LIST_CAPACITY), dtype=torch.int32, device=device)
        _choose[(num_rows,)](
            logits_SV,
            stats.peak_SB,
            stats.mass_SB,
            rows.temperature_S,
            rows.top_k_S,
            rows.top_p_S,
            rows.min_p_S,
            rows.seed_S,
            rows.position_S,
            lists if stop_ids_SN is None else stop_ids_SN,
            lists if histogram is None else histogram,
            stats.peak_SB if width is None else width,
            lists,
            torch.empty_like(stats.peak_SB),
            token_ids,
            is_valid,
            is_finished,
            *((stats.peak_SB,) * 4 if cuts is None else (cuts.peak_S, cuts.mass_S, cuts.value_S, cuts.token_id_S)),
            vocab_size,
            num_blocks,
            logits_SV.stride(0),
            NUM_STOP_IDS=num_stop_ids,
            STOP_IDS_PAD=triton.next_power_of_2(max(num_stop_ids, 1)),
            BLOCKS_PAD=max(triton.next_power_of_2(num_blocks), 16),
            KEY_SHIFT=KEY_SHIFTS[logits_SV.dtype],
            TILE=list_tile,
            TILE_BLOCKS=blocks_tile,
            HAS_HISTOGRAM=histogram is not None,
            HAS_CUTS=has_cuts,
            num_warps=num_warps,
        )
    return Sampled(token_ids_S=token_ids, is_valid_S=is_valid, is_finished_S=is_finished, stats=stats, cuts=cuts)


def _empty_cuts(num_rows: int, device: torch.device) -> Cuts:
    return Cuts(
        peak_S=torch.empty(num_rows, dtype=torch.float32, device=device),
        mass_S=torch.empty(num_rows, dtype=torch.float64, device=device),
        value_S=torch.empty(num_rows, dtype=torch.float32, device=device),
        token_id_S=torch.empty(num_rows, dtype=torch.int32, device=device),
    )
