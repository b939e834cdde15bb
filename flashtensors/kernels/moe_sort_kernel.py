"""Pairs of a row and an expert, brought together by expert on the device: a histogram, prefix sums, a scatter.

Tiles are runs of at most BLOCK_M pairs of one expert. Their number is known to the device alone, so a launch has as
many programs as the worst case has tiles, and those without one leave. Pairs of an expert lie in any order: what is
computed of a pair does not depend on where it lies.

Shapes: P pairs, X experts.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_COUNT_BLOCKS = (4096, 16384)
"""Pairs that are counted at once, where they are few and where they are many."""
_PLACE_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class SortedPairs:
    """Where each expert's pairs are, on the device."""

    pairs_P: Tensor
    """int32: `row * k + j`, by expert."""
    starts_X: Tensor
    """int32: first place of each expert in `pairs_P`."""
    ends_X: Tensor
    """int32: one past the last."""
    tile_ends_X: Tensor
    """int32: how many tiles the experts up to this one have."""
    max_tiles: int
    """How many tiles there can be at most."""


@triton.jit(do_not_specialize=["num_pairs"])
def _count(
    ids_ptr,
    starts_ptr,
    ends_ptr,
    tile_ends_ptr,
    num_pairs,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: what it reads is small, and a launch less is worth more than more programs."""
    counts = tl.zeros([NUM_COLUMNS], tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        is_pair = pairs < num_pairs
        counts += tl.histogram(tl.load(ids_ptr + pairs, mask=is_pair, other=0), NUM_COLUMNS, mask=is_pair)
    experts = tl.arange(0, NUM_COLUMNS)
    is_expert = experts < NUM_EXPERTS
    starts = tl.cumsum(counts, 0) - counts
    tl.store(starts_ptr + experts, starts, mask=is_expert)
    tl.store(ends_ptr + experts, starts, mask=is_expert)
    tl.store(tile_ends_ptr + experts, tl.cumsum((counts + BLOCK_M - 1) // BLOCK_M, 0), mask=is_expert)


@triton.jit(do_not_specialize=["num_pairs"])
def _place(ids_ptr, pairs_ptr, ends_ptr, num_pairs, BLOCK: tl.constexpr):
    """Each pair takes the next place of its expert, so that the ends, which begin at the starts, become ends."""
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_pair = pairs < num_pairs
    experts = tl.load(ids_ptr + pairs, mask=is_pair, other=0)
    places = tl.atomic_add(ends_ptr + experts, 1, mask=is_pair, sem="relaxed")
    tl.store(pairs_ptr + places, pairs, mask=is_pair)


def launch_sort(expert_ids_Tk: Tensor, num_experts: int, *, block_m: int) -> SortedPairs:
    """Sort the pairs of `expert_ids_Tk` (contiguous, int32) into tiles of `block_m`, without a word to the host."""
    num_pairs, device = expert_ids_Tk.numel(), expert_ids_Tk.device
    places_3X = torch.empty(3, num_experts, dtype=torch.int32, device=device)
    pairs_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    _count[(1,)](
        expert_ids_Tk,
        *places_3X,
        num_pairs,
        NUM_EXPERTS=num_experts,
        NUM_COLUMNS=max(32, triton.next_power_of_2(num_experts)),
        BLOCK_M=block_m,
        BLOCK=_COUNT_BLOCKS[num_pairs > _COUNT_BLOCKS[0]],
        num_warps=16,
    )
    _place[(triton.cdiv(num_pairs, _PLACE_BLOCK),)](
        expert_ids_Tk, pairs_P, places_3X[1], num_pairs, BLOCK=_PLACE_BLOCK, num_warps=8
    )
    starts_X, ends_X, tile_ends_X = places_3X
    return SortedPairs(
        pairs_P=pairs_P,
        starts_X=starts_X,
        ends_X=ends_X,
        tile_ends_X=tile_ends_X,
        max_tiles=(num_pairs + (block_m - 1) * min(num_experts, num_pairs)) // block_m,
    )
