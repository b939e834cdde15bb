"""What attention must know about one step: which rows belong to which sequence, and where their keys and values lie.

Shapes: S sequences, T new tokens of all sequences, B blocks in the longest block table.

Built once a step and shared by every layer. What the layers need again and again (the split into decodes and prefills,
gather indices, masks) is computed on first use and kept here, so that it costs once a step and not once a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """Any mix of prefill, append and decode, as one ragged batch of rows.

    Sequence `s` owns rows `query_starts[s] … query_starts[s + 1] - 1`; they are the last rows of its `kv_lengths[s]`
    tokens, and row T's key and value go to slot `slot_mapping[T]` before attention reads them.
    """

    query_starts: Tensor
    """int32 [S + 1], on the device of the caches."""
    kv_lengths: Tensor
    """int32 [S]: tokens in each sequence after this step, the new ones included."""
    block_tables: Tensor
    """int32 [S, B]: physical blocks of each sequence in order; entries past its length are any valid block id."""
    slot_mapping: Tensor
    """int64 [T]: block_id * block_size + offset of each new token."""
    spans: tuple[tuple[int, int, int], ...]
    """`(query_start, num_tokens, kv_length)` of each sequence on the host, so that nothing waits for a device."""
