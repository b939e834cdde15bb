"""Index tensors and masks that turn a ragged batch over pages into a few dense attention calls, made once a step.

Shapes: S sequences, T new tokens, N new tokens of one sequence, H key-value heads, L keys that a group reads.

A cache `[num_blocks, H, block_size, D]` is read as rows of D elements: token `p` of a sequence lies for head `h` in row
`(block_table[p // block_size] * H + h) * block_size + p % block_size`. Gathering rows rather than blocks means that
only tokens that were written are ever read: where a sequence is shorter than its group, its last token is repeated (and
masked), so whatever an unused slot holds, NaN included, cannot reach a result. It costs 5-25 % more than gathering
blocks (28 against 23 µs for 8 x 512 tokens) and saves a pass that would zero the tails.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import AttentionBatch

PlanKey = tuple[int, int, int | None, torch.dtype]
"""(num_kv_heads, block_size, sliding_window, dtype of the mask)."""

GATHERED_BYTES = 4 * 1024**2
"""Keys that a CPU gathers for one call, and values as many, so that they stay in its caches and in memory that was used
before. For 256 sequences of 1,000 tokens at once, fresh pages were touched, written and read back: 155 ms instead of 46
in fp32, and 146 instead of 27 where they had 200 to 1,000 tokens (two cores, three heads of dim 64)."""


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """Sequences with one new token each, computed together, padded to the longest."""

    query_rows_S: Tensor | None
    """Rows of these sequences in the batch; None: all rows, in order."""
    cache_rows: Tensor
    """int64 [S * H * L]: cache rows to gather."""
    kv_length: int
    """L."""
    mask_S11L: Tensor | None
    """0 where a key is seen and -inf where it is padding; None: all are seen."""


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """One sequence with several new tokens."""

    query_start: int
    num_tokens: int
    cache_rows: Tensor
    """int64 [H * L]: cache rows to gather."""
    kv_length: int
    """L."""
    mask_NL: Tensor | None
    """0 where a query sees a key and -inf where not; None: plainly causal, N = L."""


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """What layers with the same key-value heads and window share within a step."""

    decodes: tuple[DecodePlan, ...]
    prefills: tuple[PrefillPlan, ...]


def plan_append(batch: AttentionBatch, k_cache: Tensor) -> Tensor:
    """int64 [T * H]: cache rows that the new keys and values of `batch` go to; made on first use and kept there."""
    _, num_kv_heads, block_size, _ = k_cache.shape
    rows = batch.append_rows.get((num_kv_heads, block_size))
    if rows is None:
        slots_T = batch.slot_mapping
        rows = _cache_rows(slots_T // block_size, slots_T % block_size, num_kv_heads, block_size).flatten()
        batch.append_rows[num_kv_heads, block_size] = rows
    return rows


def _cache_rows(blocks: Tensor, offsets: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """Rows of all heads, in a new last dimension."""
    heads_H = torch.arange(num_kv_heads, device=blocks.device)
    return (blocks.unsqueeze(-1) * num_kv_heads + heads_H) * block_size + offsets.unsqueeze(-1)


def plan_attention(
    batch: AttentionBatch, k_cache: Tensor, *, sliding_window: int | None, dtype: torch.dtype
) -> AttentionPlan:
    """The plan of `batch` for a cache shaped as `k_cache`; made on first use and kept in `batch.plans`."""
    _, num_kv_heads, block_size, _ = k_cache.shape
    key: PlanKey = (num_kv_heads, block_size, sliding_window, dtype)
    plan = batch.plans.get(key)
    if plan is None:
        row_bytes = k_cache.shape[3] * k_cache.element_size()
        max_rows = GATHERED_BYTES // row_bytes if k_cache.device.type == "cpu" else None
        planner = _Planner(batch, num_kv_heads, block_size, sliding_window, dtype, max_rows)
        plan = batch.plans[key] = planner.plan()
    return plan


@dataclass(frozen=True)
class _Planner:
    batch: AttentionBatch
    num_kv_heads: int
    block_size: int
    sliding_window: int | None
    dtype: torch.dtype
    max_rows: int | None
    """Of a cache, that one group of decodes may gather; None: any number."""

    def plan(self) -> AttentionPlan:
        spans = self.batch.spans
        decodes = [index for index, (_, num_tokens, _) in enumerate(spans) if num_tokens == 1]
        prefills = [index for index, (_, num_tokens, _) in enumerate(spans) if num_tokens > 1]
        return AttentionPlan(
            decodes=tuple(self._plan_decode(group) for group in self._group_decodes(decodes)),
            prefills=tuple(self._plan_prefill(index) for index in prefills),
        )

    def _gather_rows(self, block_tables_SB: Tensor, positions_SL: Tensor) -> Tensor:
        blocks_SL = block_tables_SB.gather(1, positions_SL // self.block_size).long()
        rows_SLH = _cache_rows(blocks_SL, positions_SL % self.block_size, self.num_kv_heads, self.block_size)
        return rows_SLH.transpose(1, 2).flatten()

    def _group_decodes(self, indices: list[int]) -> list[list[int]]:
        """Decodes to compute together: all in their order where they may be gathered at once, else by their lengths."""
        if not indices:
            return []
        lengths = {index: min(self.batch.spans[index][2], self.sliding_window or sys.maxsize) for index in indices}

        def may_gather(num_sequences: int, kv_length: int) -> bool:
            return self.max_rows is None or num_sequences * self.num_kv_heads * kv_length <= self.max_rows

        if may_gather(len(indices), max(lengths.values())):
            return [indices]
        groups: list[list[int]] = []
        for index in sorted(indices, key=lengths.__getitem__, reverse=True):
            if groups and may_gather(len(groups[-1]) + 1, lengths[groups[-1][0]]):
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def _plan_decode(self, indices: list[int]) -> DecodePlan:
        batch, window = self.batch, self.sliding_window
        lengths = [batch.spans[index][2] for index in indices]
        kv_length = max(lengths) if window is None else min(max(lengths), window)
        tables_SB, lengths_S1, query_rows_S = batch.block_tables, batch.kv_lengths.long().unsqueeze(1), None
        if len(indices) < len(batch.spans):
            indices_S = torch.tensor(indices).to(tables_SB.device, non_blocking=True)
            tables_SB, lengths_S1 = tables_SB[indices_S], lengths_S1[indices_S]
            query_rows_S = batch.query_starts[:-1][indices_S].long()
        first_S1 = (lengths_S1 - kv_length).clamp(min=0) if window is not None else torch.zeros_like(lengths_S1)
        positions_SL = first_S1 + torch.arange(kv_length, device=tables_SB.device)
        is_padded = min(lengths) < kv_length
        return DecodePlan(
            query_rows_S=query_rows_S,
            cache_rows=self._gather_rows(tables_SB, positions_SL.minimum(lengths_S1 - 1)),
            kv_length=kv_length,
            mask_S11L=self._mask(positions_SL < lengths_S1)[:, None, None] if is_padded else None,
        )

    def _plan_prefill(self, index: int) -> PrefillPlan:
        query_start, num_tokens, length = self.batch.spans[index]
        window = self.sliding_window
        start = length - num_tokens
        first = 0 if window is None else max(0, start + 1 - window)
        positions_L = torch.arange(first, length, device=self.batch.block_tables.device)
        is_plainly_causal = start == 0 and (window is None or length <= window)
        return PrefillPlan(
            query_start=query_start,
            num_tokens=num_tokens,
            cache_rows=self._gather_rows(self.batch.block_tables[index : index + 1], positions_L.unsqueeze(0)),
            kv_length=length - first,
            mask_NL=None if is_plainly_causal else self._causal_mask(positions_L[start - first :, None], positions_L),
        )

    def _causal_mask(self, query_positions_N1: Tensor, key_positions_L: Tensor) -> Tensor:
        is_seen_NL = key_positions_L <= query_positions_N1
        if self.sliding_window is not None:
            is_seen_NL &= key_positions_L > query_positions_N1 - self.sliding_window
        return self._mask(is_seen_NL)

    def _mask(self, is_seen: Tensor) -> Tensor:
        """Additive, in the dtype of the scores: a boolean mask would be converted again in every layer."""
        return torch.zeros_like(is_seen, dtype=self.dtype).masked_fill_(~is_seen, float("-inf"))
