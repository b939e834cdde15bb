"""A trace of requests for many models, some far more popular than others, and the swaps that it costs who knows it."""

from __future__ import annotations

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


def count_offline_swaps(trace: Sequence[Arrival], num_places: int) -> int:
    """Loads of an offline greedy policy: serves in the order of arrival, evicts what is wanted again last.

    Belady's rule (IBM Systems Journal 5(2), 1966); no policy that serves in this order loads less often.

    Args:
        trace: All of it is known beforehand.
        num_places: Models that fit at once.
    """
    next_use: list[float] = [math.inf] * len(trace)
    seen: dict[int, int] = {}
    for index in range(len(trace) - 1, -1, -1):
        next_use[index] = seen.get(trace[index].model, math.inf)
        seen[trace[index].model] = index
    wanted_next: dict[int, float] = {}
    num_swaps = 0
    for index, arrival in enumerate(trace):
        if arrival.model not in wanted_next:
            num_swaps += 1
            if len(wanted_next) == num_places:
                del wanted_next[max(wanted_next, key=lambda model: wanted_next[model])]
        wanted_next[arrival.model] = next_use[index]
    return num_swaps
