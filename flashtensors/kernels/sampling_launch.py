"""Launching `sampling_kernel`, and what it draws.

Shapes: S rows, V vocabulary, B blocks, N stop ids.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportUnboundVariable=false
# pyright: reportPossiblyUnboundVariable=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .arguments import require
from .block_stats import KEY_SHIFTS, BlockStats, launch_block_stats
from .mass_histogram import NUM_BINS, launch_mass_histogram
from .sampling_kernel import LIST_CAPACITY, choose
from .sampling_rows import SamplingRows, check_draws


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
        stop_ids_SN: As for `sample_rows`.
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
    num_rows = logits_SV.shape[0]
    device = logits_SV.device
    check_draws(logits_SV, rows, stop_ids_SN)
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
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_valid = torch.empty(num_rows, dtype=torch.bool, device=device)
    has_stop_ids = stop_ids_SN is not None and stop_ids_SN.shape[1] > 0
    is_finished = torch.empty_like(is_valid) if has_stop_ids else torch.zeros_like(is_valid)
    cuts = _empty_cuts(num_rows, device) if has_cuts else None
    drawn = Sampled(token_ids_S=token_ids, is_valid_S=is_valid, is_finished_S=is_finished, stats=stats, cuts=cuts)
    if num_rows:
        tiles = {"TILE": list_tile, "TILE_BLOCKS": blocks_tile, "num_warps": num_warps}
        _launch_choose(logits_SV, rows, stop_ids_SN, histogram, width, drawn, tiles)
    return drawn


def _launch_choose(
    logits_SV: Tensor,
    rows: SamplingRows,
    stop_ids_SN: Tensor | None,
    histogram: Tensor | None,
    width: Tensor | None,
    drawn: Sampled,
    tiles: dict[str, int],
) -> None:
    """The last launch; an absent tensor is replaced by one that the kernel does not touch."""
    num_rows, vocab_size = logits_SV.shape
    stats, cuts = drawn.stats, drawn.cuts
    num_blocks = stats.peak_SB.shape[1]
    num_stop_ids = 0 if stop_ids_SN is None else stop_ids_SN.shape[1]
    lists = torch.empty((num_rows, num_blocks + 2 * LIST_CAPACITY), dtype=torch.int32, device=logits_SV.device)
    choose[(num_rows,)](
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
        drawn.token_ids_S,
        drawn.is_valid_S,
        drawn.is_finished_S,
        *((stats.peak_SB,) * 4 if cuts is None else (cuts.peak_S, cuts.mass_S, cuts.value_S, cuts.token_id_S)),
        vocab_size,
        num_blocks,
        logits_SV.stride(0),
        num_stop_ids,
        STOP_IDS_PAD=triton.next_power_of_2(num_stop_ids),
        BLOCKS_PAD=max(triton.next_power_of_2(num_blocks), 16),
        KEY_SHIFT=KEY_SHIFTS[logits_SV.dtype],
        HAS_HISTOGRAM=histogram is not None,
        HAS_CUTS=cuts is not None,
        **tiles,
    )


def _empty_cuts(num_rows: int, device: torch.device) -> Cuts:
    return Cuts(
        peak_S=torch.empty(num_rows, dtype=torch.float32, device=device),
        mass_S=torch.empty(num_rows, dtype=torch.float64, device=device),
        value_S=torch.empty(num_rows, dtype=torch.float32, device=device),
        token_id_S=torch.empty(num_rows, dtype=torch.int32, device=device),
    )
