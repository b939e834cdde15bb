from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from flashtensors.engine.prefix_groups import find_groups
from flashtensors.step import RunnerLimits


def padded(tables: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    num_full = np.array([len(table) for table in tables])
    array = np.zeros((len(tables), max(int(num_full.max()), 1)), dtype=np.int32)
    for row, table in zip(array, tables, strict=True):
        row[: len(table)] = table
    return array, num_full


def groups_of(
    tables: list[list[int]], min_members: int = 2, min_blocks: int = 1, cost: float = 0.0, member_cost: float = 0.0
) -> dict[tuple[int, ...], int]:
    limits = RunnerLimits(
        num_blocks=99,
        block_size=1,
        max_slots=99,
        max_tokens_per_step=99,
        max_model_len=99,
        group_min_members=min_members,
        group_min_blocks=min_blocks,
        group_cost_blocks=cost,
        group_member_cost_blocks=member_cost,
    )
    found = find_groups(*padded(tables), limits)
    return {tuple(rows.tolist()): depth for rows, depth in found}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4], [9]], {(0, 1): 2}),
        ([[1, 2], [3, 4]], {}),
        ([[7], [7], [8], [7], [8]], {(0, 1, 3): 1, (2, 4): 1}),
        ([[], [1], [1]], {(1, 2): 1}),
        # Two deep pairs below a shallow root: apart they save 2 × 4 reads, together 3 × 1.
        ([[1, 2, 3, 4], [1, 2, 3, 4], [1, 6, 7, 8], [1, 6, 7, 8]], {(0, 1): 4, (2, 3): 4}),
        # A pair that shares one block more than all the others: together they save more.
        ([[1, 2, 3, 4]] * 2 + [[1, 2, 3, 5 + i] for i in range(3)], {(0, 1, 2, 3, 4): 3}),
        # Those that go on alone still share the root.
        ([[1, 2, 3, 4, 5, 6]] * 4 + [[1, 9], [1, 8]], {(0, 1, 2, 3): 6, (4, 5): 1}),
    ],
)
def test_the_grouping_that_saves_most(tables: list[list[int]], expected: dict[tuple[int, ...], int]) -> None:
    assert groups_of(tables) == expected


def test_small_and_shallow_groups_are_not_worth_it() -> None:
    tables = [[1, 2, 3]] * 3 + [[5, 6]] * 2 + [[8]] * 4
    assert groups_of(tables, min_members=3) == {(0, 1, 2): 3, (5, 6, 7, 8): 1}
    assert groups_of(tables, min_blocks=2) == {(0, 1, 2): 3, (3, 4): 2}


def test_groups_that_cost_more_than_they_save_are_left_out_or_joined() -> None:
    pairs = [[1, 2, 3, 4, 5]] * 2 + [[1, 2, 3, 8, 9]] * 2
    assert groups_of(pairs, cost=0.9) == {(0, 1): 5, (2, 3): 5}
    assert groups_of(pairs, cost=1.1) == {(0, 1, 2, 3): 3}  # 9 - 1.1 beats 10 - 2.2
    assert groups_of(pairs, cost=5, member_cost=1.0) == {(0, 1, 2, 3): 3}
    assert groups_of(pairs, cost=5.1, member_cost=1.0) == {}
    # The root is too shallow for all of its members together, and its deep group stays.
    assert groups_of([[1, *range(10, 20)]] * 3 + [[1]] * 2, cost=9) == {(0, 1, 2): 11}


def best_saving(tables: list[list[int]]) -> int:
    """The most that any partition of the rows saves."""

    def shared(rows: tuple[int, ...]) -> int:
        columns = zip(*(tables[row] for row in rows), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    def partitions(rows: list[int]) -> itertools.chain[int]:
        if not rows:
            return itertools.chain([0])
        first, rest = rows[0], rows[1:]
        savings = []
        for size in range(len(rest) + 1):
            for others in itertools.combinations(rest, size):
                left = [row for row in rest if row not in others]
                savings += [size * shared((first, *others)) + saving for saving in partitions(left)]
        return itertools.chain(savings)

    return max(partitions(list(range(len(tables)))))


def test_it_saves_nearly_as_much_as_the_best_of_all_partitions() -> None:
    shares = []
    for seed in range(60):
        rng = random.Random(seed)
        tables: list[list[int]] = []
        for _ in range(rng.randint(2, 6)):
            path = [0]
            for _ in range(rng.randint(0, 5)):
                path.append(path[-1] * 2 + rng.randint(1, 2))  # a block's number names the whole path to it
            tables.append(path)
        found = groups_of(tables)
        rows = [row for group in found for row in group]
        assert len(rows) == len(set(rows)), "a row in two groups"
        for group, depth in found.items():
            assert len({tuple(tables[row][:depth]) for row in group}) == 1, "a group that does not share its blocks"
        saved = sum((len(group) - 1) * depth for group, depth in found.items())
        shares.append(saved / best_saving(tables))
    assert min(shares) > 0.75
    assert sum(shares) / len(shares) > 0.95
