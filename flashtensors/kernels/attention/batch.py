"""What attention must know about one step: which rows belong to which sequence, and where their keys and values lie.

Shapes: S sequences, T new tokens of all sequences, B blocks in the longest block table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..rope_append import KvScales
    from .plan import AttentionPlan, PlanKey
    from .work import AttentionWork


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionBatch:
    """Any mix of prefill, append and decode, as one ragged batch of rows.

    Sequence `s` owns rows `query_starts[s] … query_starts[s + 1] - 1`; they are the last rows of its `kv_lengths[s]`
    tokens, and the key and value of row t go to slot `slot_mapping[t]` before attention reads them. Every sequence has
    at least one row. Built once a step and shared by all layers.
    """

    query_starts: Tensor
    """int32 [S + 1], on the device of the caches."""
    kv_lengths: Tensor
    """int32 [S]: tokens in each sequence after this step, the new ones included."""
    block_tables: Tensor
    """int32 [S, B]: physical blocks of each sequence in order; entries past its length are never read."""
    slot_mapping: Tensor
    """int64 [T]: block_id * block_size + offset of each new token."""
    spans: tuple[tuple[int, int, int], ...]
    """`(query_start, num_tokens, kv_length)` of each sequence on the host, so that nothing waits for a device."""
    works: Mapping[int | None, AttentionWork] | None = None
    """By sliding window, the work planned from the lengths on the device, which `ragged_attention` takes; `spans` is
    not looked at then, and padding may follow: sequences without rows, rows whose slot is negative. None: there is no
    such work, and attention goes by `spans`."""
    kv_scales: KvScales | None = None
    """Factors of an fp8 cache, with `works`; None: the cache has the dtype of the model."""
    append_rows: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)
    """Cache rows that new keys go to, by (num_kv_heads, block_size); filled by `plan_append` on first use."""
    plans: dict[PlanKey, AttentionPlan] = field(default_factory=dict, init=False, repr=False)
    """Gather indices and masks that layers of one shape share; filled by `plan_attention` on first use."""
