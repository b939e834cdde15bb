"""Logprobs on a GPU: of the chosen token and of the likeliest, from the block sums that sampling leaves behind.

    logprob_v = l_v - peak - log(sum exp(l - peak))

The likeliest tokens come one by one: the block with the largest peak is read again, gives its largest token that is
not taken yet, and gets a new peak. One program a row; rows that want nothing end at once.

Shapes: S rows, V vocabulary, B blocks, K alternatives.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import require
from .block_stats import BLOCK, BlockStats, launch_block_stats

_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def _token_logprobs(
    logits_ptr,
    peak_ptr,
    mass_ptr,
    token_ids_ptr,
    num_logprobs_ptr,
    chosen_ptr,
    top_ids_ptr,
    top_ptr,
    vocab_size,
    num_blocks,
    row_stride,
    num_top,
    BLOCKS_PAD: tl.constexpr,
    HAS_NUM_LOGPROBS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_wanted = num_top
    if HAS_NUM_LOGPROBS:
        num_wanted = tl.minimum(tl.load(num_logprobs_ptr + row), num_top)
    if num_wanted >= 0:
        blocks = tl.arange(0, BLOCKS_PAD)
        is_block = blocks < num_blocks
        peaks = tl.load(peak_ptr + row * num_blocks + blocks, mask=is_block, other=float("-inf"))
        masses = tl.load(mass_ptr + row * num_blocks + blocks, mask=is_block, other=0.0)
        peak = tl.max(peaks, axis=0)
        normaliser = peak + tl.log(tl.sum(masses * tl.exp(peaks - peak), axis=0))
        logits_row_ptr = logits_ptr + row * row_stride
        chosen = tl.load(logits_row_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
        tl.store(chosen_ptr + row, chosen - normaliser)
        last_id = tl.full([], -1, tl.int32)
        last = tl.full([], float("inf"), tl.float32)
        for rank in tl.range(0, num_wanted):
            largest = tl.max(peaks, axis=0)
            block = tl.min(tl.where(peaks == largest, blocks, num_blocks - 1), axis=0)
            token_ids = block * _BLOCK + tl.arange(0, _BLOCK)
            is_token = token_ids < vocab_size
            logits = tl.load(logits_row_ptr + token_ids, mask=is_token, other=float("-inf")).to(tl.float32)
            is_left = (logits < last) | (token_ids > last_id)
            token_id = tl.min(tl.where(is_left & (logits == largest), token_ids, vocab_size), axis=0)
            is_after = (logits < largest) | ((logits == largest) & (token_ids > token_id))
            next_peak = tl.max(tl.where(is_after, logits, float("-inf")), axis=0)
            peaks = tl.where(blocks == block, next_peak, peaks)
            tl.store(top_ids_ptr + row * num_top + rank, tl.where(largest > float("-inf"), token_id, 0))
            tl.store(top_ptr + row * num_top + rank, largest - normaliser)
            last, last_id = largest, token_id


def launch_token_logprobs(
    logits_SV: Tensor,
    token_ids_S: Tensor,
    num_top: int,
    *,
    num_logprobs_S: Tensor | None = None,
    stats: BlockStats | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs of the chosen tokens, and ids and logprobs `[S, num_top]` of the likeliest; waits for nothing.

    Args:
        logits_SV: As for `launch_sample`; not checked here, nor are the next two: see `sampling.check_logprobs`.
        token_ids_S: int64 chosen tokens.
        num_top: K, at most V.
        num_logprobs_S: int32: how many alternatives a row wants, -1 for no logprobs at all; what a row did not ask for
            is undefined. None: every row wants K.
        stats: Of `launch_sample` with the same `num_logprobs_S`, which saves reading all logits; None: compute it.

    Returns:
        float32 [S], int64 [S, K], float32 [S, K]. Where fewer than K tokens have a probability, the rest is token 0
        with -inf.
    """
    num_rows, vocab_size = logits_SV.shape
    device = logits_SV.device
    if num_logprobs_S is not None:
        require("num_logprobs_S", num_logprobs_S, torch.int32, (num_rows,), device)
    if stats is None or stats.plain_mass_SB is None:
        stats = launch_block_stats(logits_SV, None, None)
    chosen = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    num_blocks = stats.peak_SB.shape[1]
    if num_rows:
        _token_logprobs[(num_rows,)](
            logits_SV,
            stats.peak_SB,
            stats.plain_mass_SB,
            token_ids_S,
            token_ids_S if num_logprobs_S is None else num_logprobs_S,
            chosen,
            top_ids,
            top,
            vocab_size,
            num_blocks,
            logits_SV.stride(0),
            num_top,
            BLOCKS_PAD=max(triton.next_power_of_2(num_blocks), 16),
            HAS_NUM_LOGPROBS=num_logprobs_S is not None,
            num_warps=4,
        )
    return chosen, top_ids, top
