"""Host memory: how much of each model's image stays there.

An image is kept in the order in which its bytes are used, and gives way from its end. The images that are wanted least
shrink to their heads first; only then are heads taken. What stays need not be read from the disk when the model comes
back, and is copied while the rest is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .tiers import Tier, TierBudget

HEAD_SHARE = 0.125
"""Share of an image that stays as long as other images have tails to give."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that may shrink now."""

    model: str
    image_bytes: int
    """Of the whole model."""
    worth: float
    """Expected uses per second."""


class HostRoom:
    """Accounts of the host tier.

    Args:
        capacity_bytes: Memory for images; 0: there is no host tier.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._budget = TierBudget(Tier.HOST, capacity_bytes)

    @property
    def capacity_bytes(self) -> int:
        """Memory for images."""
        return self._budget.capacity_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that no image holds."""
        return self._budget.free_bytes

    def held_bytes(self, model: str) -> int:
        """Bytes of the image of `model`, those it may still grow to among them."""
        return self._budget.held_bytes(model)

    def holders(self) -> list[str]:
        """Models with an image, or a part of one."""
        return self._budget.holders()

    def settle(self, model: str, num_bytes: int) -> None:
        """Correct what the image of `model` holds to what it took."""
        self._budget.hold(model, num_bytes)

    def grow(self, model: str, wanted_bytes: int, others: Sequence[Image]) -> list[tuple[str, int]]:
        """Let the image of `model` grow to `wanted_bytes`, or as far as there is room, and reserve it.

        Args:
            model: Whose image grows.
            wanted_bytes: Of the whole image.
            others: Images that may shrink for it.

        Returns:
            Who must shrink, and to how many bytes.
        """
        lacking_bytes = wanted_bytes - self.held_bytes(model) - self.free_bytes
        kept: dict[str, int] = {}
        ranked = sorted(others, key=lambda each: each.worth)
        for keeps_heads in (True, False):
            for image in ranked:
                if lacking_bytes <= 0:
                    break
                now_bytes = kept.get(image.model, self.held_bytes(image.model))
                least_bytes = int(image.image_bytes * HEAD_SHARE) if keeps_heads else 0
                freed_bytes = min(lacking_bytes, max(0, now_bytes - least_bytes))
                if freed_bytes:
                    kept[image.model] = now_bytes - freed_bytes
                    lacking_bytes -= freed_bytes
        for victim, num_bytes in kept.items():
            self._budget.hold(victim, num_bytes)
        self._budget.hold(model, max(self.held_bytes(model), wanted_bytes - max(0, lacking_bytes)))
        return list(kept.items())
