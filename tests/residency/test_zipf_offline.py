"""The offline policy that swaps are held against, against every possible choice on short traces."""

from __future__ import annotations

import random
from functools import cache

import pytest

from benchmarks.residency.zipf_trace import Arrival, count_offline_swaps, make_trace


def count_fewest_swaps(models: tuple[int, ...], num_places: int) -> int:
    """By trying every eviction."""

    @cache
    def fewest(index: int, held: frozenset[int]) -> int:
        if index == len(models):
            return 0
        model = models[index]
        if model in held:
            return fewest(index + 1, held)
        if len(held) < num_places:
            return 1 + fewest(index + 1, held | {model})
        return 1 + min(fewest(index + 1, held - {victim} | {model}) for victim in held)

    return fewest(0, frozenset())


@pytest.mark.parametrize("seed", range(40))
def test_nobody_who_serves_in_order_swaps_less(seed: int) -> None:
    rng = random.Random(seed)
    models = tuple(rng.randrange(6) for _ in range(14))
    num_places = rng.randint(1, 4)
    trace = [Arrival(float(index), model) for index, model in enumerate(models)]
    assert count_offline_swaps(trace, num_places) == count_fewest_swaps(models, num_places)


def test_arrivals_are_as_frequent_and_as_uneven_as_asked() -> None:
    trace = make_trace(num_models=10, exponent=1.0, requests_per_s=50.0, duration_s=200.0)
    assert len(trace) == pytest.approx(10_000, rel=0.05)
    assert [arrival.time_s for arrival in trace] == sorted(arrival.time_s for arrival in trace)
    counts = [sum(arrival.model == model for arrival in trace) for model in (0, 4, 9)]
    assert counts[0] / counts[1] == pytest.approx(5.0, rel=0.15)
    assert counts[0] / counts[2] == pytest.approx(10.0, rel=0.2)
