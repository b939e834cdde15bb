"""Where a model's bytes are, how far it is on its way, and the account of a tier's memory."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Tier(enum.Enum):
    """A place that holds weights, slowest first."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class State(enum.Enum):
    """How far a model is on its way to the device and back."""

    ABSENT = "absent"
    LOADING = "loading"
    """Its files are planned, it waits for room, or its first bytes move."""
    READY = "ready"
    """Requests start; its last layers may still be on their way."""
    UNLOADING = "unloading"
    """It takes no new work; it leaves once its running requests have ended."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Memory that a model wants: a fixed part (weights) and one that may shrink and grow (KV cache)."""

    fixed_bytes: int
    min_flexible_bytes: int
    """With less than this the model is of no use."""
    max_flexible_bytes: int
    """More than this it could not use."""
    step_bytes: int = 1
    """The flexible part is a multiple of this."""

    def __post_init__(self) -> None:
        """Hold our own invariant."""
        assert self.fixed_bytes >= 0
        assert 0 <= self.min_flexible_bytes <= self.max_flexible_bytes
        assert self.step_bytes >= 1
        assert self.min_flexible_bytes % self.step_bytes == 0, "the least is a whole number of steps"

    @property
    def min_bytes(self) -> int:
        """Least bytes that must be free."""
        return self.fixed_bytes + self.min_flexible_bytes

    def flexible_bytes(self, free_bytes: int, share: float, fair_bytes: int | None = None) -> int:
        """The flexible part for a tier with `free_bytes` left: `share` of what the fixed part leaves, in bounds.

        Args:
            free_bytes: At least `min_bytes`.
            share: In (0, 1].
            fair_bytes: What this model may take in all when others want room too; the least part is given anyway.
        """
        offered = int((free_bytes - self.fixed_bytes) * share)
        if fair_bytes is not None:
            offered = min(offered, fair_bytes - self.fixed_bytes)
        offered = min(max(offered, self.min_flexible_bytes), self.max_flexible_bytes)
        return offered - offered % self.step_bytes


@dataclass
class TierBudget:
    """Who holds how many bytes of one tier; never more than its capacity."""

    tier: Tier
    capacity_bytes: int
    _held: dict[str, int] = field(default_factory=dict)
    _total_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds."""
        return self.capacity_bytes - self._total_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes that are held."""
        return self._total_bytes

    def held_bytes(self, model: str) -> int:
        """Bytes that `model` holds; 0 when it holds none."""
        return self._held.get(model, 0)

    def holders(self) -> list[str]:
        """Who holds bytes, longest first."""
        return list(self._held)

    def hold(self, model: str, num_bytes: int) -> None:
        """Set what `model` holds; more than before must be free, and 0 forgets it."""
        more_bytes = num_bytes - self.held_bytes(model)
        assert num_bytes >= 0, f"{model} cannot hold {num_bytes} bytes"
        assert more_bytes <= self.free_bytes, f"{model} wants {more_bytes} of {self.free_bytes} free bytes"
        self._total_bytes += more_bytes
        if num_bytes:
            self._held[model] = num_bytes
        else:
            self._held.pop(model, None)
