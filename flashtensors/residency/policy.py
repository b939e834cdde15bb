"""Who makes room: those that cost least per byte that they free.

What an eviction costs is the seconds that it takes to bring the model back, times how often it is asked for: the
seconds of swapping that the eviction is expected to cause in each second. Bytes are freed at the least cost per byte,
greedily (Greedy-Dual-Size with frequency; Cao and Irani 1997, Cherkasova 1998), and those that turn out not to be
needed are spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may be asked to leave."""

    model: str
    num_bytes: int
    """Bytes that it frees."""
    cost: float
    """Expected seconds of swapping per second."""
    last_used_s: float

    @property
    def rank(self) -> tuple[float, float]:
        """Lowest goes first; of equals the one unused for longest."""
        return self.cost / max(1, self.num_bytes), self.last_used_s


def choose_victims(candidates: Sequence[Candidate], num_bytes: int) -> list[Candidate]:
    """Candidates that together free at least `num_bytes`, cheapest first; empty when all together free less."""
    victims: list[Candidate] = []
    freed_bytes = 0
    for candidate in sorted(candidates, key=lambda each: each.rank):
        if freed_bytes >= num_bytes:
            break
        victims.append(candidate)
        freed_bytes += candidate.num_bytes
    if freed_bytes < num_bytes:
        return []
    return _spare(victims, freed_bytes - num_bytes)


def _spare(victims: list[Candidate], excess_bytes: int) -> list[Candidate]:
    """Leave out victims, the costliest first, as long as the others free enough."""
    spared: set[str] = set()
    for victim in sorted(victims, key=lambda each: each.cost, reverse=True):
        if victim.num_bytes <= excess_bytes:
            excess_bytes -= victim.num_bytes
            spared.add(victim.model)
    return [victim for victim in victims if victim.model not in spared]
