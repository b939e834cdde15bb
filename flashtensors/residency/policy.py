"""Which models make room for another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that may be asked to leave."""

    model: str
    num_bytes: int
    last_used_s: float
    num_leases: int
    """Requests in flight; the model leaves only after they have ended."""


class EvictionPolicy(Protocol):
    """Chooses victims; the machine says who may be chosen and waits for their requests."""

    def choose(self, candidates: Sequence[Candidate], num_bytes: int) -> list[str]:
        """Models that together hold at least `num_bytes`; empty when all candidates hold less."""
        ...


class LeastRecentlyUsed:
    """Idle models before busy ones, and among them the one unused for longest first."""

    def choose(self, candidates: Sequence[Candidate], num_bytes: int) -> list[str]:
        """Models that together hold at least `num_bytes`; empty when all candidates hold less."""
        victims: list[str] = []
        for candidate in sorted(candidates, key=lambda each: (each.num_leases > 0, each.last_used_s)):
            if num_bytes <= 0:
                break
            victims.append(candidate.model)
            num_bytes -= candidate.num_bytes
        return victims if num_bytes <= 0 else []
