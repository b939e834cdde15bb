"""The device's memory: what models hold, and what evicted models' KV caches hold until somebody needs the room."""

from __future__ import annotations

from .tiers import Demand, Tier, TierBudget


class DeviceRoom:
    """Accounts of one device.

    Args:
        capacity_bytes: Memory that weights and KV caches may take together.
        flexible_share: Share of the free memory beside its weights that one model's KV cache may take.
        kept_share: Share of the capacity that KV caches of evicted models may take.
    """

    def __init__(self, capacity_bytes: int, *, flexible_share: float, kept_share: float) -> None:
        self.capacity_bytes = capacity_bytes
        self._budget = TierBudget(Tier.DEVICE, capacity_bytes)
        self._kept: dict[str, int] = {}
        self._flexible_share = flexible_share
        self._max_kept_bytes = int(capacity_bytes * kept_share)

    @property
    def free_bytes(self) -> int:
        """Bytes that neither a model nor a kept KV cache holds."""
        return self._budget.free_bytes - self.total_kept_bytes

    @property
    def total_kept_bytes(self) -> int:
        """Bytes of all kept KV caches."""
        return sum(self._kept.values())

    def held_bytes(self, model: str) -> int:
        """Bytes of `model` on the device, a kept KV cache apart."""
        return self._budget.held_bytes(model)

    def kept_bytes(self, model: str) -> int:
        """Bytes of the kept KV cache of `model`; 0: there is none."""
        return self._kept.get(model, 0)

    def kept_models(self) -> list[str]:
        """Evicted models whose KV caches are kept."""
        return list(self._kept)

    def need_bytes(self, model: str, demand: Demand) -> int:
        """Bytes that must be free for `model`; one that left its KV cache here needs the fixed part only."""
        return demand.fixed_bytes if model in self._kept else demand.min_bytes

    def admit(self, model: str, demand: Demand, available_bytes: int, fair_bytes: int) -> tuple[int, bool]:
        """Reserve memory for a model.

        Args:
            model: Holds none yet.
            demand: What it wants.
            available_bytes: Of the free bytes, those that it may use; at least `need_bytes`.
            fair_bytes: What one model may take when all that are wanted share the device.

        Returns:
            Bytes for its KV cache, and whether they are those that were kept.
        """
        assert self._budget.held_bytes(model) == 0, f"{model} holds memory already"
        kept_bytes = self._kept.pop(model, 0)
        flexible_bytes = kept_bytes or demand.flexible_bytes(available_bytes, self._flexible_share, fair_bytes)
        self._budget.hold(model, demand.fixed_bytes + flexible_bytes)
        return flexible_bytes, kept_bytes > 0

    def settle(self, model: str, num_bytes: int) -> None:
        """Correct what `model` holds to what it took, which is no more than was reserved."""
        held_bytes = self._budget.held_bytes(model)
        assert num_bytes <= held_bytes, f"{model} took {num_bytes} bytes, but reserved {held_bytes}"
        self._budget.hold(model, num_bytes)

    def release(self, model: str, *, kept_bytes: int = 0) -> None:
        """Give back what `model` holds, but for the KV cache that is kept."""
        assert 0 <= kept_bytes <= self._budget.held_bytes(model), f"{model} cannot keep {kept_bytes} bytes"
        self._budget.hold(model, 0)
        if kept_bytes:
            self._kept[model] = kept_bytes

    def may_keep(self, num_bytes: int, pending_bytes: int) -> bool:
        """Whether one more KV cache of `num_bytes` stays within the share for kept ones and `pending_bytes`."""
        return num_bytes > 0 and self.total_kept_bytes + pending_bytes + num_bytes <= self._max_kept_bytes

    def drop_kept(self, model: str) -> None:
        """Give back a kept KV cache."""
        del self._kept[model]
