"""A trace of requests for many models, some far more popular than others, and the swaps that it costs who knows it."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    time_s: float
    model: int
    """Rank of the model, 0 the most popular."""


def make_trace(
    *, num_models: int, exponent: float, requests_per_s: float, duration_s: float, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals, each for model `k` with a probability in proportion to `1 / (k + 1) ** exponent`."""
    rng = random.Random(seed)
    weights = [(rank + 1) ** -exponent for rank in range(num_models)]
    arrivals: list[Arrival] = []
    time_s = rng.expovariate(requests_per_s)
    while time_s < duration_s:
        arrivals.append(Arrival(time_s, rng.choices(range(num_models), weights)[0]))
        time_s += rng.expovariate(requests_per_s)
    return arrivals


def count_offline_swaps(
    trace: Sequence[Arrival],
    num_places: int,
    *,
    knows_arrivals: bool = True,
    swap_s: float = 0.0,
    answer_s: float = 0.0,
) -> int:
    """Loads of an offline greedy policy, which serves in the order of arrival.

    One that knows every arrival evicts what is wanted again last. With no time for swaps and answers this is Belady's
    rule (IBM Systems Journal 5(2), 1966): whoever serves in this order loads no less often. One that knows how often
    each model is wanted, but not when, evicts what is wanted least; where arrivals have no memory, nobody without
    foresight does better. Models that still answer cannot leave.

    Args:
        trace: All of it is known beforehand.
        num_places: Models that fit at once.
        knows_arrivals: Which of the two policies.
        swap_s: One swap after the other takes this long.
        answer_s: An answer takes this long, and keeps its model.
    """
    wishes: dict[int, list[float]] = {}
    for arrival in trace:
        wishes.setdefault(arrival.model, []).append(arrival.time_s)
    busy_until_s: dict[int, float] = {}
    """When the last answer ends, by model that is there."""
    link_free_s = 0.0
    num_swaps = 0
    for arrival in trace:
        model, start_s = arrival.model, arrival.time_s
        if model not in busy_until_s:
            num_swaps += 1
            start_s = max(start_s, link_free_s)
            if len(busy_until_s) == num_places:
                start_s = max(start_s, min(busy_until_s.values()))
                idle = [each for each, until_s in busy_until_s.items() if until_s <= start_s]
                worth = _wish_count if not knows_arrivals else _nearness
                del busy_until_s[min(idle, key=lambda each: worth(wishes[each], arrival.time_s))]
            start_s = link_free_s = start_s + swap_s
        busy_until_s[model] = max(busy_until_s.get(model, 0.0), start_s + answer_s)
    return num_swaps


def _nearness(times_s: list[float], now_s: float) -> float:
    """The sooner the next wish comes, the more."""
    index = bisect.bisect_right(times_s, now_s)
    return -times_s[index] if index < len(times_s) else -math.inf


def _wish_count(times_s: list[float], now_s: float) -> float:
    return len(times_s)
