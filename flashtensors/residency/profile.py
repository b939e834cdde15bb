"""What stays known of a model, wherever its bytes are."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .popularity import Popularity
from .tiers import Demand, Tier


class Work(enum.Enum):
    """What the owner does for a model now; one thing at a time."""

    PLAN = "plan"
    LOAD = "load"
    """From the admission until every byte has landed."""
    FILL = "fill"
    """Disk to host memory only."""


@dataclass(eq=False, slots=True)
class Profile:
    """A model that was asked for at least once."""

    model: str
    demand: Demand | None = None
    """Device memory that it wants; None: not planned yet."""
    image_bytes: int = 0
    """Host memory that all of it takes; 0: there is no host tier for it."""
    popularity: Popularity = field(default_factory=Popularity)
    work: Work | None = None
    source: Tier = Tier.DISK
    """Where the bytes of the latest load came from."""
    is_fill_stopped: bool = False
    """The fill ends early because the model is wanted on the device."""
    fill_tickets: list[int] = field(default_factory=list)
    """Callers who want it in host memory."""
    was_replanned: bool = False
    """For those callers its files were planned again, because they had changed; that is done once."""
