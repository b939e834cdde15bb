"""Triton bodies of `speculative.py`.

A chain takes four launches: the two of sampling over all S * N rows, which also say what each row was drawn from, then
the residual's weight by blocks, and the draw from it. Rows whose drafts are all accepted read nothing in the last two.

Shapes: S rows, N nodes or logits of a row, D = N - 1 drafts, V vocabulary, B blocks.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_stats import BLOCK, temperature_scale
from .sampling_launch import launch_sample
from .sampling_rows import SamplingRows
from .speculative import ACCEPT_STREAM, RESIDUAL_STREAM, Verified
from .token_search import uniform, weigh

_BLOCK = tl.constexpr(BLOCK)
_ACCEPT_STREAM = tl.constexpr(ACCEPT_STREAM)
_RESIDUAL_STREAM = tl.constexpr(RESIDUAL_STREAM)


@triton.jit
def _walk(
    sampled_ptr,
    draft_ptr,
    parents_ptr,
    num_accepted_ptr,
    next_token_ptr,
    path_ptr,
    NUM_NODES: tl.constexpr,
    NODES_PAD: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
):
    """Follow one row's sampled tokens through its nodes."""
    first = tl.program_id(0).to(tl.int64) * NUM_NODES
    nodes = tl.arange(0, NODES_PAD)
    is_node = nodes < NUM_NODES
    draft = tl.load(draft_ptr + first + nodes, mask=is_node, other=-1)
    parents = nodes - 1
    if HAS_PARENTS:
        parents = tl.load(parents_ptr + first + nodes, mask=is_node, other=-1)
    is_draft = (nodes > 0) & (draft >= 0)
    path = tl.full([NODES_PAD], -1, tl.int32)
    num_accepted = tl.full([], -1, tl.int32)
    next_token = tl.full([], 0, tl.int64)
    node = tl.full([], 0, tl.int32)
    while node < NUM_NODES:
        num_accepted += 1
        next_token = tl.load(sampled_ptr + first + node)
        path = tl.where(nodes == num_accepted, node, path)
        # A child comes after its parent, so this ends whatever the parents say.
        is_child = is_draft & (parents == node) & (draft == next_token) & (nodes > node)
        node = tl.min(tl.where(is_child, nodes, NUM_NODES), axis=0)
    tl.store(path_ptr + first + nodes, path, mask=is_node)
    tl.store(num_accepted_ptr + tl.program_id(0), num_accepted)
    tl.store(next_token_ptr + tl.program_id(0), next_token)


# fmt: off
@triton.jit
def _target_probability(
    logits, token_ids, row, temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr
):
    """float32 probabilities with which the target draws tokens of a row of S * N."""
    temperature = tl.load(temperature_ptr + row)
    cut_value = tl.load(cut_value_ptr + row)
    weights = weigh(logits, tl.load(cut_peak_ptr + row), temperature_scale(temperature))
    min_p = tl.where(temperature > 0.0, tl.load(min_p_ptr + row), 0.0)
    is_kept = (logits > cut_value) | ((logits == cut_value) & (token_ids <= tl.load(cut_token_id_ptr + row)))
    return tl.where(is_kept & (weights >= min_p), weights, 0.0) / tl.load(cut_mass_ptr + row).to(tl.float32)


@triton.jit
def _count_accepted(
    logits_ptr, draft_ptr, draft_probs_ptr, is_valid_ptr, seed_ptr, position_ptr,
    temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr,
    sequence, vocab_size, NUM_DRAFTS: tl.constexpr, DRAFTS_PAD: tl.constexpr,
):
    """How many of a sequence's drafts are accepted, and the one that is rejected, or -1."""
    index = tl.arange(0, DRAFTS_PAD)
    is_index = index < NUM_DRAFTS
    draft = tl.load(draft_ptr + sequence * NUM_DRAFTS + index, mask=is_index, other=-1)
    is_draft = draft >= 0
    row = tl.where(is_index, sequence * (NUM_DRAFTS + 1) + index, sequence * (NUM_DRAFTS + 1))
    logits = tl.load(logits_ptr + row * vocab_size + draft, mask=is_draft, other=float("-inf")).to(tl.float32)
    probs_at = draft_probs_ptr + (sequence * NUM_DRAFTS + index) * vocab_size + draft
    q = tl.load(probs_at, mask=is_draft, other=0.0)
    p = _target_probability(
        logits, draft, row, temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr
    )
    fraction = uniform(tl.load(seed_ptr + row) ^ _ACCEPT_STREAM, tl.load(position_ptr + row))
    is_accepted = is_draft & (fraction * q < p) & (tl.load(is_valid_ptr + row) != 0)
    num_accepted = tl.min(tl.where(is_accepted, NUM_DRAFTS, index), axis=0)
    rejected = tl.max(tl.where(index == num_accepted, draft, -1), axis=0)
    return num_accepted, rejected


@triton.jit
def _residual(
    logits_ptr, draft_probs_ptr, token_ids, sequence, num_accepted, temperature_ptr, min_p_ptr,
    cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr, vocab_size, NUM_DRAFTS: tl.constexpr,
):
    """`max(0, p - q)` of tokens where the first draft was rejected."""
    row = sequence * (NUM_DRAFTS + 1) + num_accepted
    is_token = token_ids < vocab_size
    logits = tl.load(logits_ptr + row * vocab_size + token_ids, mask=is_token, other=float("-inf")).to(tl.float32)
    probs_at = draft_probs_ptr + (sequence * NUM_DRAFTS + num_accepted) * vocab_size + token_ids
    q = tl.load(probs_at, mask=is_token, other=0.0)
    p = _target_probability(
        logits, token_ids, row, temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr,
        cut_token_id_ptr,
    )
    return tl.where(is_token, tl.maximum(p - q, 0.0), 0.0)


@triton.jit
def _residual_stats(
    logits_ptr, draft_ptr, draft_probs_ptr, is_valid_ptr, seed_ptr, position_ptr,
    temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr,
    mass_ptr, vocab_size, num_blocks, tiles_per_row,
    NUM_DRAFTS: tl.constexpr, DRAFTS_PAD: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):
    """The residual's weight in the blocks of one tile of a sequence; of sequences with a rejection."""
    sequence = (tl.program_id(0) // tiles_per_row).to(tl.int64)
    num_accepted, rejected = _count_accepted(
        logits_ptr, draft_ptr, draft_probs_ptr, is_valid_ptr, seed_ptr, position_ptr,
        temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr,
        sequence, vocab_size, NUM_DRAFTS, DRAFTS_PAD,
    )
    if rejected >= 0:
        block = (tl.program_id(0) % tiles_per_row) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        token_ids = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        residual = _residual(
            logits_ptr, draft_probs_ptr, token_ids, sequence, num_accepted, temperature_ptr, min_p_ptr,
            cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr, vocab_size, NUM_DRAFTS,
        )
        tl.store(mass_ptr + sequence * num_blocks + block, tl.sum(residual, axis=1), mask=block < num_blocks)


@triton.jit
def _verify(
    logits_ptr, draft_ptr, draft_probs_ptr, is_valid_ptr, seed_ptr, position_ptr,
    temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr,
    mass_ptr, sampled_ptr, num_accepted_ptr, next_token_ptr, next_valid_ptr, vocab_size, num_blocks,
    NUM_DRAFTS: tl.constexpr, DRAFTS_PAD: tl.constexpr, BLOCKS_PAD: tl.constexpr,
):
    """Count one sequence's accepted drafts and draw the token after them."""
    sequence = tl.program_id(0).to(tl.int64)
    num_accepted = tl.full([], 0, tl.int32)
    rejected = tl.full([], -1, tl.int64)
    if NUM_DRAFTS > 0:
        num_accepted, rejected = _count_accepted(
            logits_ptr, draft_ptr, draft_probs_ptr, is_valid_ptr, seed_ptr, position_ptr,
            temperature_ptr, min_p_ptr, cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr,
            sequence, vocab_size, NUM_DRAFTS, DRAFTS_PAD,
        )
    row = sequence * (NUM_DRAFTS + 1) + num_accepted
    is_valid = tl.load(is_valid_ptr + row) != 0
    token_id = tl.load(sampled_ptr + row)
    if (rejected >= 0) & is_valid:
        blocks = tl.arange(0, BLOCKS_PAD)
        masses = tl.load(mass_ptr + sequence * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
        cumulative = tl.cumsum(masses.to(tl.float64), axis=0)
        fraction = uniform(tl.load(seed_ptr + row) ^ _RESIDUAL_STREAM, tl.load(position_ptr + row))
        target = fraction * tl.max(cumulative, axis=0)
        last_block = tl.max(tl.where(masses > 0.0, blocks, 0), axis=0)
        block = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), axis=0), last_block)
        before = tl.max(tl.where(blocks < block, cumulative, 0.0), axis=0)
        token_ids = block * _BLOCK + tl.arange(0, _BLOCK)
        residual = _residual(
            logits_ptr, draft_probs_ptr, token_ids, sequence, num_accepted, temperature_ptr, min_p_ptr,
            cut_peak_ptr, cut_mass_ptr, cut_value_ptr, cut_token_id_ptr, vocab_size, NUM_DRAFTS,
        ).to(tl.float64)
        is_past = (residual > 0.0) & (before + tl.cumsum(residual, axis=0) > target)
        first = tl.min(tl.where(is_past, token_ids, vocab_size), axis=0)
        last = tl.max(tl.where(residual > 0.0, token_ids, -1), axis=0)
        redrawn = tl.where(first < vocab_size, first, last).to(tl.int64)
        token_id = tl.where(redrawn >= 0, redrawn, rejected)  # nothing is left when rounding alone rejected
    tl.store(num_accepted_ptr + sequence, num_accepted)
    tl.store(next_token_ptr + sequence, token_id)
    tl.store(next_valid_ptr + sequence, is_valid)
# fmt: on


def launch_walk_drafts(
    sampled_SN: Tensor, draft_SN: Tensor, parents_SN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`walk_drafts` of arguments that it has checked; waits for nothing."""
    num_rows, num_nodes = sampled_SN.shape
    num_accepted = torch.empty(num_rows, dtype=torch.int32, device=sampled_SN.device)
    next_token = torch.empty(num_rows, dtype=torch.int64, device=sampled_SN.device)
    path = torch.empty((num_rows, num_nodes), dtype=torch.int32, device=sampled_SN.device)
    if num_rows:
        _walk[(num_rows,)](
            sampled_SN,
            draft_SN,
            path if parents_SN is None else parents_SN,
            num_accepted,
            next_token,
            path,
            NUM_NODES=num_nodes,
            NODES_PAD=triton.next_power_of_2(num_nodes),
            HAS_PARENTS=parents_SN is not None,
            num_warps=1,
        )
    return num_accepted, next_token, path


def launch_verify_chain(
    logits_SNV: Tensor,
    draft_SD: Tensor,
    draft_probs_SDV: Tensor,
    rows: SamplingRows,
    *,
    tile: int = 4096,
    num_warps: int = 8,
) -> Verified:
    """`verify_chain` of arguments that it has checked; waits for nothing. `tile` is a multiple of 128."""
    num_rows, num_drafts = draft_SD.shape
    vocab_size, device = logits_SNV.shape[-1], logits_SNV.device
    sampled = launch_sample(logits_SNV.view(-1, vocab_size), rows, has_cuts=True)
    cuts = sampled.cuts
    assert cuts is not None, "cuts were asked for"
    num_blocks, num_tiles = triton.cdiv(vocab_size, BLOCK), triton.cdiv(vocab_size, tile)
    mass = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=device)
    num_accepted = torch.empty(num_rows, dtype=torch.int32, device=device)
    next_token = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_valid = torch.empty(num_rows, dtype=torch.bool, device=device)
    # fmt: off
    shared = (
        logits_SNV, draft_SD, draft_probs_SDV, sampled.is_valid_S, rows.seed_S, rows.position_S, rows.temperature_S,
        rows.min_p_S, cuts.peak_S, cuts.mass_S, cuts.value_S, cuts.token_id_S, mass,
    )
    # fmt: on
    drafts_pad = triton.next_power_of_2(max(num_drafts, 1))
    if num_rows and num_drafts:
        _residual_stats[(num_rows * num_tiles,)](
            *shared,
            vocab_size,
            num_blocks,
            num_tiles,
            NUM_DRAFTS=num_drafts,
            DRAFTS_PAD=drafts_pad,
            TILE_BLOCKS=tile // BLOCK,
            num_warps=num_warps,
        )
    if num_rows:
        _verify[(num_rows,)](
            *shared,
            sampled.token_ids_S,
            num_accepted,
            next_token,
            is_valid,
            vocab_size,
            num_blocks,
            NUM_DRAFTS=num_drafts,
            DRAFTS_PAD=drafts_pad,
            BLOCKS_PAD=max(triton.next_power_of_2(num_blocks), 16),
            num_warps=4,
        )
    return Verified(num_accepted_S=num_accepted, next_token_S=next_token, is_valid_S=is_valid)
