"""Where a model's bytes are, the state it is in there, and the account of a tier's memory."""

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
    """Its files are planned, it waits for room, or its bytes move."""
    READY = "ready"
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

    def flexible_bytes(self, free_bytes: int, share: float) -> int:
        """The flexible part for a tier with `free_bytes` left: `share` of what the fixed part leaves, in bounds."""
        offered = int((free_bytes - self.fixed_bytes) * share)
        return min(max(offered, self.min_flexible_bytes), self.max_flexible_bytes)


@dataclass
class TierBudget:
    """Who holds how many bytes of one tier; never more than its capacity."""

    tier: Tier
    capacity_bytes: int
    _held: dict[str, int] = field(default_factory=dict)

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds."""
        return self.capacity_bytes - sum(self._held.values())

    def held_bytes(self, model: str) -> int:
        """Bytes that `model` holds; 0 when it holds none."""
        return self._held.get(model, 0)

    def reserve(self, model: str, num_bytes: int) -> None:
        """Set aside `num_bytes`, which must be free, for a model that holds none."""
        assert model not in self._held, f"{model} holds memory already"
        assert 0 <= num_bytes <= self.free_bytes, f"{model} wants {num_bytes} of {self.free_bytes} free bytes"
        self._held[model] = num_bytes

    def shrink(self, model: str, num_bytes: int) -> None:
        """Correct what `model` holds to what it really took."""
        assert num_bytes <= self._held[model], f"{model} took {num_bytes} bytes, but reserved {self._held[model]}"
        self._held[model] = num_bytes

    def release(self, model: str) -> None:
        """Give back all that `model` holds."""
        self._held.pop(model, None)
