"""Puts a step's spans in order: members of a prefix group side by side.

Groups outlive steps. While the same slots decode nothing is looked at; when slots come or go, those that came look for
a group to join, and only those that find none are grouped anew among themselves.

Shapes: S spans, G groups, N slots.
"""

from __future__ import annotations

import numpy as np

from ..kvcache.blocks import BlockPool
from ..step import NUM_GROUP_COLUMNS, RunnerLimits, int_rows
from .batch import Batch
from .prefix_groups import find_groups

_ONE_DRAWN = np.array([1, 1], dtype=np.int32)
_NO_GROUP = 2**31 - 1


class SpanOrder:
    """Remembers which slot is in which group.

    Args:
        limits: When a group is worth it.
        batch: Holds the block tables.
        pool: Knows which blocks are shared.
    """

    def __init__(self, limits: RunnerLimits, batch: Batch, pool: BlockPool) -> None:
        self._limits = limits
        self._block_size = limits.block_size
        self._min_members = max(limits.group_min_members, 2) if limits.group_min_members else 0
        self._min_blocks = max(limits.group_min_blocks, 1)
        self._batch = batch
        self._pool = pool
        self._group_of_N = np.full(limits.max_slots, _NO_GROUP, dtype=np.int64)
        self._seen_N = np.full(limits.max_slots, -1, dtype=np.int64)
        self._prefixes: dict[int, np.ndarray] = {}  # by group: the blocks that its members share
        self._ends: dict[int, int] = {}  # by the last of these blocks: the group
        self._num_groups = 0
        self._slots_S = np.zeros(0, dtype=np.int32)  # as they came last, before they were put in order
        self._next_S4: np.ndarray | None = None  # likewise, a token further; None: not all of them decoded
        self._order_S: np.ndarray | None = None
        self._groups_G3 = int_rows([], NUM_GROUP_COLUMNS)

    def arrange(self, spans_S4: np.ndarray, *, has_starts: bool) -> tuple[np.ndarray, np.ndarray, bool]:
        """The spans in order, their groups, and whether both are those of the last call a token further.

        Args:
            spans_S4: What the step computes; called once for each step.
            has_starts: Whether a slot changes hands in this step.
        """
        is_steady = not has_starts and self._next_S4 is not None and np.array_equal(spans_S4, self._next_S4)
        is_settled = is_steady or (not has_starts and bool((spans_S4[:, 2:] == _ONE_DRAWN).all()))
        if not is_steady:
            slots_S = spans_S4[:, 0].copy()
            if not is_settled or self._next_S4 is None or not np.array_equal(slots_S, self._slots_S):
                self._group(spans_S4)
            self._slots_S = slots_S
        self._next_S4 = _a_token_further(spans_S4) if is_settled else None
        return spans_S4 if self._order_S is None else spans_S4[self._order_S], self._groups_G3, is_steady

    def repeat(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """`arrange` for the spans of the last call a token further, all of which decoded."""
        spans_S4 = self._next_S4
        assert spans_S4 is not None, "a step that did not decode is repeated"
        self._next_S4 = _a_token_further(spans_S4)
        return spans_S4 if self._order_S is None else spans_S4[self._order_S], self._groups_G3, True

    def _group(self, spans_S4: np.ndarray) -> None:
        """Bring the groups up to date with these spans, and put them in order."""
        self._order_S, self._groups_G3 = None, int_rows([], NUM_GROUP_COLUMNS)
        if not 0 < self._min_members <= len(spans_S4) or (self._pool.num_shared == 0 and not self._prefixes):
            return
        slots_S = spans_S4[:, 0].astype(np.int64)
        num_full_S = spans_S4[:, 1] // self._block_size
        self._place_newcomers(slots_S, num_full_S, spans_S4[:, 2] == 1)
        sizes = self._dissolve_small(slots_S)
        if not sizes:
            return
        self._order_S = np.argsort(self._group_of_N[slots_S], kind="stable")
        sizes_G = np.array(list(sizes.values()))
        depths_G = np.array([len(self._prefixes[group]) for group in sizes])
        self._groups_G3 = np.stack([sizes_G.cumsum() - sizes_G, sizes_G, depths_G], axis=1).astype(np.int32)

    def _place_newcomers(self, slots_S: np.ndarray, num_full_S: np.ndarray, is_decoding_S: np.ndarray) -> None:
        """Let slots that were not looked at, or begin to decode, join a group or make a new one."""
        seen_S = self._batch.epochs_N[slots_S] * 2 + is_decoding_S
        is_new_S = self._seen_N[slots_S] != seen_S
        is_stranger_S = self._seen_N[slots_S] // 2 != self._batch.epochs_N[slots_S]
        self._group_of_N[slots_S[is_stranger_S]] = _NO_GROUP
        self._seen_N[slots_S] = seen_S
        has_lonely_newcomer = False
        for row in np.flatnonzero(is_new_S & (num_full_S >= self._min_blocks)).tolist():
            slot = int(slots_S[row])
            if self._group_of_N[slot] == _NO_GROUP and self._is_shared(slot):
                has_lonely_newcomer |= not self._join(slot, int(num_full_S[row]))
        if has_lonely_newcomer:
            is_lonely_S = (self._group_of_N[slots_S] == _NO_GROUP) & (num_full_S >= self._min_blocks)
            rows = [row for row in np.flatnonzero(is_lonely_S).tolist() if self._is_shared(int(slots_S[row]))]
            self._make_groups(slots_S[rows], num_full_S[rows])

    def _is_shared(self, slot: int) -> bool:
        """Whether the shortest prefix worth a group is in another block table too."""
        return self._pool.ref_counts[self._batch.tables_NB[slot, self._min_blocks - 1]] > 1

    def _join(self, slot: int, num_full: int) -> bool:
        table = self._batch.tables_NB[slot, :num_full]
        for block_id in reversed(table.tolist()):
            group = self._ends.get(block_id)
            if group is not None and np.array_equal(table[: len(self._prefixes[group])], self._prefixes[group]):
                self._group_of_N[slot] = group
                return True
        return False

    def _make_groups(self, slots_S: np.ndarray, num_full_S: np.ndarray) -> None:
        if len(slots_S) < self._min_members:
            return
        tables_SB = self._batch.tables_NB[slots_S, : int(num_full_S.max())]
        for rows, num_blocks in find_groups(tables_SB, num_full_S, self._limits):
            prefix = tables_SB[rows[0], :num_blocks].copy()
            self._prefixes[self._num_groups], self._ends[int(prefix[-1])] = prefix, self._num_groups
            self._group_of_N[slots_S[rows]] = self._num_groups
            self._num_groups += 1

    def _dissolve_small(self, slots_S: np.ndarray) -> dict[int, int]:
        """Members of each group among these slots, by group; groups that are not worth it any more are forgotten."""
        if not self._prefixes:
            return {}
        groups, sizes = np.unique(self._group_of_N[slots_S], return_counts=True)
        present = dict(zip(groups.tolist(), sizes.tolist(), strict=True))
        gains = {
            group: self._limits.group_gain(present.get(group, 0), len(prefix))
            for group, prefix in self._prefixes.items()
        }
        for group in [group for group, gain in gains.items() if gain < 0]:
            self._group_of_N[self._group_of_N == group] = _NO_GROUP
            last_block = int(self._prefixes.pop(group)[-1])
            if self._ends.get(last_block) == group:
                del self._ends[last_block]
        return {group: size for group, size in present.items() if group in self._prefixes}


def _a_token_further(spans_S4: np.ndarray) -> np.ndarray:
    further_S4 = spans_S4.copy()
    further_S4[:, 1] += 1
    return further_S4
