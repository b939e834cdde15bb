"""One step's spans as the tensors that a model takes.

Shapes: S spans, T tokens of all spans, B blocks in the longest block table, N slots, R spans that sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.attention.batch import AttentionBatch
from .slots import SlotTable


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """Arguments of a model's forward, and where the tokens that it draws belong."""

    token_ids_T: Tensor
    positions_T: Tensor
    batch: AttentionBatch
    sample_rows_R: Tensor
    sample_slots_R: np.ndarray
    sample_positions_R: np.ndarray
    """Of the tokens to be drawn, in their sequences."""


def build_inputs(spans: np.ndarray, slots: SlotTable, block_size: int) -> StepInputs:
    """Gather the spans' tokens and block tables from `slots`; a fixed number of array operations for any batch."""
    device = slots.token_ids_NL.device
    slots_S, starts_S, num_tokens_S, samples_S = spans.astype(np.int64).T
    ends_S = starts_S + num_tokens_S
    query_starts = np.zeros(len(spans) + 1, dtype=np.int64)
    num_tokens_S.cumsum(out=query_starts[1:])
    slots_T = slots_S.repeat(num_tokens_S)
    positions_T = np.arange(query_starts[-1]) + (starts_S - query_starts[:-1]).repeat(num_tokens_S)
    blocks_T, offsets_T = np.divmod(positions_T, block_size)
    slot_mapping_T = slots.block_tables_NB[slots_T, blocks_T] * np.int64(block_size) + offsets_T
    num_blocks = -(-int(ends_S.max()) // block_size)
    sampling_S = np.flatnonzero(samples_S)

    rows_3T = _to_device(
        np.stack((slots_T * slots.token_ids_NL.shape[1] + positions_T, positions_T, slot_mapping_T)), device
    )
    batch = AttentionBatch(
        query_starts=_to_device(query_starts.astype(np.int32), device),
        kv_lengths=_to_device(ends_S.astype(np.int32), device),
        block_tables=_to_device(slots.block_tables_NB[slots_S, :num_blocks], device),
        slot_mapping=rows_3T[2],
        spans=tuple(zip(query_starts[:-1].tolist(), num_tokens_S.tolist(), ends_S.tolist(), strict=True)),
    )
    return StepInputs(
        token_ids_T=slots.token_ids_NL.view(-1).index_select(0, rows_3T[0]).long(),
        positions_T=rows_3T[1],
        batch=batch,
        sample_rows_R=_to_device(query_starts[1:][sampling_S] - 1, device),
        sample_slots_R=slots_S[sampling_S],
        sample_positions_R=ends_S[sampling_S],
    )


def _to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy without waiting: what a step sends is small enough for the driver to take it over at once."""
    return torch.from_numpy(array).to(device, non_blocking=True)
