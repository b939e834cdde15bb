"""One life of a model on the device: from the first who wants it until it is dropped."""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field

from .profile import Profile, Work
from .tiers import State

RequestTicket = str
"""What the owner calls a request."""


class Phase(enum.Enum):
    """Where a life is."""

    WANTED = State.LOADING, "its plan, or the end of a fill, is awaited"
    QUEUED = State.LOADING, "it waits for room"
    MOVING = State.LOADING, "its bytes move"
    READY = State.READY, "requests start"
    LEAVING = State.UNLOADING, "its last requests end"

    @property
    def state(self) -> State:
        """What others see of it."""
        return self.value[0]


@dataclass(frozen=True, slots=True)
class WaitingLoad:
    """A caller who waits for a model."""

    ticket: int
    since_s: float
    keep_alive_s: float | None
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request that waits for a model."""

    since_s: float
    keep_alive_s: float | None


@dataclass(eq=False, slots=True)
class Resident:
    """A model on the device, on its way there, or leaving."""

    model: str
    profile: Profile
    keep_alive_s: float
    phase: Phase = Phase.WANTED
    is_on_device: bool = False
    """The owner has something to drop."""
    is_dropping: bool = False
    keeps_kv: bool = False
    """Its KV cache stays when it is dropped."""
    is_pinned: bool = False
    is_outdated: bool = False
    """Its files have changed since."""
    was_replanned: bool = False
    """Its load found other files than those that were planned; it may do so once."""
    flexible_bytes: int = 0
    num_leases: int = 0
    last_used_s: float = 0.0
    promised_until_s: float = -math.inf
    """It is not evicted until then; promised once in a life, and over with the first request."""
    reason: str = ""
    """Why it leaves."""
    loads: list[WaitingLoad] = field(default_factory=list)
    """Wait until this life has landed; once it leaves, for the next life."""
    requests: dict[RequestTicket, WaitingRequest] = field(default_factory=dict)
    """Wait until this life is ready; once it leaves, for the next life."""
    unload_tickets: list[int] = field(default_factory=list)
    victims: list[Resident] = field(default_factory=list)
    """Lives that ended to make room for this one, until it has landed."""
    has_failed: bool = False
    """Its load failed: its victims come back."""

    @property
    def is_wanted(self) -> bool:
        """Whether anybody waits for it."""
        return bool(self.loads or self.requests)

    @property
    def waited_since_s(self) -> float:
        """When the oldest of those who wait came; infinite when nobody does."""
        requests = itertools.islice(self.requests.values(), 1)
        return min((waiting.since_s for waiting in [*self.loads[:1], *requests]), default=math.inf)

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and nothing runs on it."""
        return self.phase is Phase.READY and not self.num_leases

    @property
    def is_moving(self) -> bool:
        """Whether the owner still loads it."""
        return self.profile.work is Work.LOAD

    def leave(self, reason: str) -> None:
        """Take no new requests; the life ends when nothing runs any more. Without a reason nothing is reported."""
        self.phase, self.reason = Phase.LEAVING, reason

    @property
    def expires_at_s(self) -> float | None:
        """When it leaves for idleness; None: not while this lasts."""
        if not self.is_idle or self.is_moving or self.is_pinned or self.keep_alive_s < 0:
            return None
        return max(self.last_used_s + self.keep_alive_s, self.promised_until_s)
