from __future__ import annotations

import random

import numpy as np
import pytest

from flashtensors.engine.forecast import count_lasting_blocks, peak_usage, usage_at_ends

from .traffic import Traffic, limits, request


def simulate(tables: list[list[int]], lengths: list[int], ends: list[int], block_size: int) -> list[int]:
    """Distinct blocks held in each step, one step after the other."""
    usage, tables, fresh = [], [list(table) for table in tables], 1_000_000
    for step in range(max(ends) + 1):
        held = set()
        for table, length, end in zip(tables, lengths, ends, strict=True):
            if step > end:
                continue
            while len(table) * block_size < length + step:
                table.append(fresh)
                fresh += 1
            held |= set(table)
        usage.append(len(held))
    return usage


@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_it_counts_what_a_step_by_step_simulation_counts(block_size: int) -> None:
    for seed in range(200):
        rng = random.Random(seed)
        shared = list(range(rng.randint(0, 6)))
        lengths, tables, ends = [], [], []
        for index in range(rng.randint(1, 12)):
            length = rng.randint(1, 60)
            num_held = -(-length // block_size) - rng.choice([0, 1])  # the block for the next token may be missing
            own = range(100 * (index + 1), 100 * (index + 1) + num_held)
            tables.append([*shared[: rng.randint(0, 6)], *own][:num_held])
            lengths.append(length)
            ends.append(rng.randint(0, 50))
        num_held = np.array([len(table) for table in tables])
        padded = np.zeros((len(tables), max(int(num_held.max()), 1)), dtype=np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        arrays = np.array(lengths), np.array(ends)
        offsets = count_lasting_blocks(padded, num_held, arrays[1], 2000) - num_held
        usage = simulate(tables, lengths, ends, block_size)
        ends_sorted, at_ends = usage_at_ends(*arrays, offsets, block_size)
        expected = {end: usage[end] for end in ends}
        assert dict(zip(ends_sorted.tolist(), at_ends.tolist(), strict=True)) == expected, f"seed {seed}"
        assert peak_usage(*arrays, offsets, block_size) == max(usage), f"seed {seed}"


def test_nobody_holds_nothing() -> None:
    nothing = np.zeros(0, dtype=np.int64)
    assert peak_usage(nothing, nothing, nothing, 16) == 0


@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_the_engine_uses_as_much_as_it_foresaw(enable_prefix_caching: bool) -> None:
    for seed in range(60):
        rng = random.Random(seed)
        traffic = Traffic(limits(num_blocks=400, max_tokens_per_step=1000), enable_prefix_caching=enable_prefix_caching)
        root = [rng.randrange(30) for _ in range(20)]
        for number in range(rng.randint(1, 8)):
            prompt = root[: rng.randint(0, 20)] + [rng.randrange(30) for _ in range(rng.randint(1, 20))]
            traffic.add(request(f"r{number}", prompt, max_tokens=rng.randint(2, 60), ignore_eos=True))
        traffic.step()  # everybody is admitted, and all prompts are computed
        scheduler = traffic.engine.scheduler
        pool = scheduler.cache.pool
        foreseen = scheduler.admission.peak_blocks(scheduler.running_slots)
        seen = 0
        while traffic.engine.has_work:
            seen = max(seen, _num_held_while_planning(traffic, pool.num_blocks))
        assert foreseen == seen, f"seed {seed}"


def _num_held_while_planning(traffic: Traffic, num_blocks: int) -> int:
    """Blocks held when a step was launched, before the ends of its answers gave some back."""
    held: list[int] = []

    launch = traffic.runner.launch
    traffic.runner.launch = lambda plan: (  # pyright: ignore[reportAttributeAccessIssue]
        held.append(num_blocks - traffic.engine.scheduler.cache.pool.num_free),
        launch(plan),
    )
    traffic.step()
    del traffic.runner.launch
    return max(held, default=0)
