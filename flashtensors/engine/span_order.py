"""Puts a step's spans in order: members of a prefix group side by side.

Shapes: S spans, G groups.
"""

from __future__ import annotations

import numpy as np

from ..step import NUM_GROUP_COLUMNS, RunnerLimits, int_rows
from .batch import Batch
from .prefix_groups import find_groups

_A_TOKEN_FURTHER = np.array([0, 1, 0, 0], dtype=np.int32)
_ONE_DRAWN = np.array([1, 1], dtype=np.int32)


class SpanOrder:
    """Finds groups when the spans change, and remembers them while the same slots decode.

    Args:
        limits: When a group is worth it.
        batch: Holds the block tables.
    """

    def __init__(self, limits: RunnerLimits, batch: Batch) -> None:
        self._limits = limits
        self._batch = batch
        self._slots_S = np.zeros(0, dtype=np.int32)  # as they came last, before they were put in order
        self._spans_S4 = np.zeros((0, 4), dtype=np.int32)
        self._is_settled = False  # whether all spans of the last step decoded
        self._order_S: np.ndarray | None = None
        self._groups_G3 = int_rows([], NUM_GROUP_COLUMNS)

    def arrange(
        self, spans_S4: np.ndarray, *, has_starts: bool, can_share: bool
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """The spans in order, their groups, and whether both are those of the last call a token further.

        Args:
            spans_S4: What the step computes; called once for each step.
            has_starts: Whether a slot changes hands in this step.
            can_share: Whether any block is in two block tables.
        """
        slots_S = spans_S4[:, 0].copy()
        is_settled = not has_starts and bool((spans_S4[:, 2:] == _ONE_DRAWN).all())
        is_same = is_settled and self._is_settled and np.array_equal(slots_S, self._slots_S)
        if not is_same:
            self._group(spans_S4, can_share=can_share)
        if self._order_S is not None:
            spans_S4 = spans_S4[self._order_S]
        is_steady = is_same and np.array_equal(spans_S4, self._spans_S4 + _A_TOKEN_FURTHER)
        self._slots_S, self._spans_S4, self._is_settled = slots_S, spans_S4, is_settled
        return spans_S4, self._groups_G3, is_steady

    def _group(self, spans_S4: np.ndarray, *, can_share: bool) -> None:
        self._order_S, self._groups_G3 = None, int_rows([], NUM_GROUP_COLUMNS)
        min_members = self._limits.group_min_members
        if not can_share or not 0 < min_members <= len(spans_S4):
            return
        num_full_S = spans_S4[:, 1] // self._limits.block_size
        num_columns = max(int(num_full_S.max()), 1)
        groups = find_groups(
            self._batch.tables_NB[spans_S4[:, 0], :num_columns],
            num_full_S,
            min_members=max(min_members, 2),
            min_blocks=max(self._limits.group_min_blocks, 1),
        )
        if not groups:
            return
        sizes = np.array([len(rows) for rows, _ in groups])
        depths = np.array([depth for _, depth in groups])
        grouped = np.concatenate([rows for rows, _ in groups])
        rest = np.ones(len(spans_S4), dtype=bool)
        rest[grouped] = False
        self._order_S = np.concatenate([grouped, np.flatnonzero(rest)])
        self._groups_G3 = np.stack([sizes.cumsum() - sizes, sizes, depths], axis=1).astype(np.int32)
