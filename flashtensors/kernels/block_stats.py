"""The one pass over all logits: peak and weight of every block of 128 neighbours, from which the rest is told.

Shapes: S rows, V vocabulary, B blocks, H bins of a histogram.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SHIFT = 7
BLOCK = 1 << BLOCK_SHIFT
"""Neighbouring tokens that share a peak and a weight."""

KEY_SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits of fp32 that a dtype of logits lacks."""

_BLOCK = tl.constexpr(BLOCK)
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_TEMPERATURE = tl.constexpr(1e-30)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStats:
    """Sums that one pass over logits leaves behind."""

    peak_SB: Tensor
    """float32: largest logit of a block."""
    mass_SB: Tensor
    """float32: `sum exp((l - peak) / temperature)`; NaN where a logit is NaN or +inf."""
    plain_mass_SB: Tensor | None
    """The same with temperature 1, of rows that want logprobs; None when no row does."""


@triton.jit
def temperature_scale(temperature):
    """Factor of logits before `exp2`; greedy rows weigh as with temperature 1."""
    return tl.where(temperature > 0.0, _LOG2_E / tl.maximum(temperature, _MIN_TEMPERATURE), _LOG2_E)


@triton.jit
def _block_stats(
    logits_ptr,
    temperature_ptr,
    num_logprobs_ptr,
    peak_ptr,
    mass_ptr,
    plain_mass_ptr,
    histogram_ptr,
    vocab_size,
    num_blocks,
    row_stride,
    tiles_per_row,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    NUM_BINS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Peak and mass of the blocks of one tile of one row; the first tile empties the row's histogram."""
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_row
    scale = _LOG2_E
    if HAS_TEMPERATURE:
        scale = temperature_scale(tl.load(temperature_ptr + row))
    block = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    token_ids = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    logits_at = logits_ptr + row * row_stride + token_ids
    logits = tl.load(logits_at, mask=token_ids < vocab_size, other=float("-inf")).to(tl.float32)
    peak = tl.max(logits, axis=1)
    shifted = logits - tl.where(peak == float("-inf"), 0.0, peak)[:, None]
    stats_at = row * num_blocks + block
    is_block = block < num_blocks
    tl.store(peak_ptr + stats_at, peak, mask=is_block)
    tl.store(mass_ptr + stats_at, tl.sum(tl.exp2(shifted * scale), axis=1), mask=is_block)
    if HAS_LOGPROBS and tl.load(num_logprobs_ptr + row) >= 0:
        tl.store(plain_mass_ptr + stats_at, tl.sum(tl.exp2(shifted * _LOG2_E), axis=1), mask=is_block)
    if NUM_BINS > 0 and tile == 0:
        tl.store(histogram_ptr + row * NUM_BINS + tl.arange(0, NUM_BINS), tl.zeros([NUM_BINS], dtype=tl.int64))


def launch_block_stats(
    logits_SV: Tensor,
    temperature_S: Tensor | None,
    num_logprobs_S: Tensor | None,
    histogram_SH: Tensor | None = None,
    *,
    tile: int = 4096,
    num_warps: int = 8,
) -> BlockStats:
    """Peaks and masses of the blocks of every row; without temperatures, those of temperature 1.

    `plain_mass_SB` is of rows with `num_logprobs_S` of 0 or more, and undefined for others;
    without temperatures, of all rows. `histogram_SH` is int64 and set to 0; H is a power of two.
    """
    num_rows, vocab_size = logits_SV.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    peak, mass, plain = torch.empty((3, num_rows, num_blocks), dtype=torch.float32, device=logits_SV.device).unbind()
    if num_rows and vocab_size:
        num_tiles = triton.cdiv(vocab_size, tile)
        _block_stats[(num_rows * num_tiles,)](
            logits_SV,
            peak if temperature_S is None else temperature_S,
            peak if num_logprobs_S is None else num_logprobs_S,
            peak,
            mass,
            plain,
            peak if histogram_SH is None else histogram_SH,
            vocab_size,
            num_blocks,
            logits_SV.stride(0),
            num_tiles,
            HAS_TEMPERATURE=temperature_S is not None,
            HAS_LOGPROBS=num_logprobs_S is not None,
            NUM_BINS=0 if histogram_SH is None else histogram_SH.shape[1],
            TILE_BLOCKS=tile // BLOCK,
            num_warps=num_warps,
        )
    if temperature_S is None:
        plain = mass
    has_plain = temperature_S is None or num_logprobs_S is not None
    return BlockStats(peak_SB=peak, mass_SB=mass, plain_mass_SB=plain if has_plain else None)
