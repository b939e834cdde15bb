"""Which sequences of a step share enough first blocks to read them together (Hydragen, arXiv 2402.05099).

Block tables that begin alike form a tree. A group of m sequences over d shared blocks saves (m - 1) × d reads of a
block, and costs what the runner's limits say. From the leaves up, each branching either keeps the groups below it or
dissolves them into a wider and shallower one, whichever gains more.

Shapes: S spans, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..step import RunnerLimits


@dataclass(slots=True)
class _Subtree:
    """The best grouping of some rows whose tables begin alike."""

    groups: list[tuple[np.ndarray, int]] = field(default_factory=list)
    """Rows, and the number of blocks that they share."""
    ungrouped: list[np.ndarray] = field(default_factory=list)
    gain: float = 0.0

    @property
    def num_ungrouped(self) -> int:
        return sum(len(rows) for rows in self.ungrouped)

    def take(self, other: _Subtree) -> None:
        """Add the grouping of other rows."""
        self.groups += other.groups
        self.ungrouped += other.ungrouped
        self.gain += other.gain


def find_groups(tables_SB: np.ndarray, num_full_S: np.ndarray, limits: RunnerLimits) -> list[tuple[np.ndarray, int]]:
    """Groups of rows, each with the number of first blocks that its members share; no row is in two.

    Args:
        tables_SB: Block ids, one table a row.
        num_full_S: Blocks at the front of each table that may be shared: full, and not written by this step.
        limits: Which groups are worth it.
    """
    rows = np.flatnonzero(num_full_S >= limits.group_min_blocks)
    if len(rows) < limits.group_min_members:
        return []
    return _Grouping(tables_SB, num_full_S, limits).best(rows, 0).groups


class _Grouping:
    def __init__(self, tables_SB: np.ndarray, num_full_S: np.ndarray, limits: RunnerLimits) -> None:
        self._tables_SB = tables_SB
        self._num_full_S = num_full_S
        self._limits = limits

    def best(self, rows: np.ndarray, depth: int) -> _Subtree:
        """The best grouping of `rows`, which share their first `depth` blocks."""
        if depth > 0:
            depth = self._shared_depth(rows, depth)
        branches, rest = self._split(rows, depth)
        apart, joined = _Subtree(ungrouped=[rest]), _Subtree(ungrouped=[rest])
        for branch in branches:
            below = self.best(branch, depth + 1)
            num_grouped = len(branch) - below.num_ungrouped
            gain_here = num_grouped * (depth - self._limits.group_member_cost_blocks)
            apart.take(below)
            joined.take(_Subtree(ungrouped=[branch]) if gain_here >= below.gain else below)
        gain = self._limits.group_gain(joined.num_ungrouped, depth)
        if gain < 0 or joined.gain + gain < apart.gain:
            return apart
        joined.gain += gain
        joined.groups.append((np.sort(np.concatenate(joined.ungrouped)), depth))
        joined.ungrouped = []
        return joined

    def _shared_depth(self, rows: np.ndarray, depth: int) -> int:
        """How many first blocks all rows share, at least `depth`."""
        tables = self._tables_SB[rows, depth : int(self._num_full_S[rows].min())]
        is_shared = (tables == tables[0]).all(axis=0)
        return depth + (len(is_shared) if is_shared.all() else int(is_shared.argmin()))

    def _split(self, rows: np.ndarray, depth: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Rows that go on with the same block, where they are enough for a group, and all others."""
        is_longer = self._num_full_S[rows] > depth
        if not is_longer.any():
            return [], rows
        longer = rows[is_longer]
        _, branch_of, sizes = np.unique(self._tables_SB[longer, depth], return_inverse=True, return_counts=True)
        is_large = sizes >= max(self._limits.group_min_members, 2)
        branches = [longer[branch_of == branch] for branch in np.flatnonzero(is_large)]
        return branches, np.concatenate([rows[~is_longer], longer[~is_large[branch_of]]])
