"""Weight by distance from the peak, for rows with top-p alone: it tells where a nucleus ends before anything is listed.

Tokens lighter than `(1 - p) * mass / V` together hold less than `(1 - p) * mass`, so the nucleus ends above them. The
way down to there is cut into bins of equal width in log2 of the weight. Weights relative to the upper edge of their
bin, in (1/2^width, 1], are summed as integers, so the order of addition does not matter.

Shapes: S rows, V vocabulary, H bins.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .block_stats import BLOCK, BlockStats, temperature_scale
from .sampling_rows import SamplingRows
from .token_search import bin_of, weigh

NUM_BINS = 1024
"""H."""

_BLOCK = tl.constexpr(BLOCK)
_NUM_BINS = tl.constexpr(NUM_BINS)
_UNIT = tl.constexpr(2.0**24)
_MIN_WIDTH = tl.constexpr(2.0**-12)
_PROGRAMS = 2048


@triton.jit
def has_nucleus_alone(temperature, top_k, top_p, vocab_size):
    """Whether a row draws with top-p and without top-k."""
    return (temperature > 0.0) & (top_p < 1.0) & ((top_k <= 0) | (top_k >= vocab_size))


@triton.jit
def bin_masses(histogram_row_ptr, bins, width):
    """float64 weights of the bins, relative to the peak."""
    sums = tl.load(histogram_row_ptr + bins).to(tl.float64)
    return sums * (tl.exp2(-bins * width).to(tl.float64) / _UNIT)


@triton.jit
def _add_masses(
    logits_ptr,
    peak_ptr,
    mass_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    histogram_ptr,
    width_ptr,
    vocab_size,
    num_blocks,
    row_stride,
    programs_per_row,
    BLOCKS_PAD: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Add a share of one row's tiles to its histogram; tiles whose peak is below all bins are not read."""
    row = (tl.program_id(0) // programs_per_row).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if has_nucleus_alone(temperature, tl.load(top_k_ptr + row), top_p, vocab_size):
        scale = temperature_scale(temperature)
        blocks = tl.arange(0, BLOCKS_PAD)
        stats_at = row * num_blocks + blocks
        peaks = tl.load(peak_ptr + stats_at, mask=blocks < num_blocks, other=float("-inf"))
        masses = tl.load(mass_ptr + stats_at, mask=blocks < num_blocks, other=0.0)
        peak = tl.max(peaks, axis=0)
        total = tl.sum(masses * weigh(peaks, peak, scale), axis=0)
        if (peak > float("-inf")) & (peak < float("inf")) & (total == total):
            range_log2 = tl.log2(vocab_size / (tl.maximum(1.0 - top_p.to(tl.float32), 1e-7) * total))
            width = tl.maximum((range_log2 + 0.01) / _NUM_BINS, _MIN_WIDTH)
            tl.store(width_ptr + row, width)
            factor = scale / width
            num_tiles = tl.cdiv(num_blocks, TILE_BLOCKS)
            for tile in tl.range(tl.program_id(0) % programs_per_row, num_tiles, programs_per_row):
                block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
                is_block = block < num_blocks
                tile_peaks = tl.load(peak_ptr + row * num_blocks + block, mask=is_block, other=float("-inf"))
                if tl.min(bin_of(tile_peaks, peak, factor), axis=0) < _NUM_BINS:
                    token_ids = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
                    logits_at = logits_ptr + row * row_stride + token_ids
                    logits = tl.load(logits_at, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
                    bins = bin_of(logits, peak, factor)
                    relative = tl.exp2((logits - peak) * scale + bins * width)
                    units = (relative * _UNIT + 0.5).to(tl.int64)
                    tl.atomic_add(histogram_ptr + row * _NUM_BINS + bins, units, mask=bins < _NUM_BINS, sem="relaxed")


def launch_mass_histogram(
    logits_SV: Tensor,
    rows: SamplingRows,
    stats: BlockStats,
    histogram_SH: Tensor,
    width_S: Tensor,
    *,
    tile: int = 2048,
    num_warps: int = 8,
) -> None:
    """Add the weights of rows with top-p alone to int64 `histogram_SH`, which holds zeros, and set float32 `width_S`.

    Other rows cost nothing and get nothing.
    """
    num_rows, vocab_size = logits_SV.shape
    num_blocks = stats.peak_SB.shape[1]
    programs_per_row = max(1, min(triton.cdiv(vocab_size, tile), _PROGRAMS // num_rows))
    _add_masses[(num_rows * programs_per_row,)](
        logits_SV,
        stats.peak_SB,
        stats.mass_SB,
        rows.temperature_S,
        rows.top_k_S,
        rows.top_p_S,
        histogram_SH,
        width_S,
        vocab_size,
        num_blocks,
        logits_SV.stride(0),
        programs_per_row,
        BLOCKS_PAD=max(triton.next_power_of_2(num_blocks), 16),
        TILE_BLOCKS=tile // BLOCK,
        num_warps=num_warps,
    )
