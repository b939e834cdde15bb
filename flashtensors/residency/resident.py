"""What the machine remembers of a model that is not absent."""

from __future__ import annotations

from dataclasses import dataclass, field

from .tiers import Demand, State


@dataclass(frozen=True)
class WaitingLoad:
    """A caller who waits for a model."""

    ticket: int
    keep_alive_s: float | None
    is_pinned: bool


@dataclass(eq=False)
class Resident:
    """A model that is not absent."""

    model: str
    keep_alive_s: float
    state: State = State.LOADING
    is_pinned: bool = False
    demand: Demand | None = None
    is_owner_busy: bool = True
    """The owner plans, reads or drops, and will report."""
    num_leases: int = 0
    last_used_s: float = 0.0
    promised_until_s: float = 0.0
    reason: str = ""
    """Why it leaves."""
    loads: list[WaitingLoad] = field(default_factory=list)
    """Wait for this life of the model; once it unloads, for the next."""
    unload_tickets: list[int] = field(default_factory=list)

    @property
    def expires_at_s(self) -> float | None:
        """When it leaves for idleness; None: not while this lasts."""
        if self.state is not State.READY or self.num_leases or self.is_pinned or self.keep_alive_s < 0:
            return None
        return max(self.last_used_s + self.keep_alive_s, self.promised_until_s)
