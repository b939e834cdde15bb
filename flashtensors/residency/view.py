"""What is where: the state of the residency machine, to be read."""

from __future__ import annotations

from .ledger import Ledger
from .profile import Work
from .tiers import State, Tier


class ResidencyView:
    """Answers questions about models and memory.

    Args:
        ledger: The books.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.device = ledger.device
        """The device's memory, to be read."""
        self.host = ledger.host
        """Host memory, to be read."""
        self.rates = ledger.rates
        """What bringing a model back costs; the owner lets it observe loads."""
        self._ledger = ledger
        self._profiles = ledger.profiles
        self._residents = ledger.residents

    def state(self, model: str) -> State:
        """How far `model` is."""
        resident = self._residents.get(model)
        return State.ABSENT if resident is None else resident.phase.state

    def tier(self, model: str) -> Tier:
        """The fastest tier that holds all of `model`."""
        if self.state(model) is State.READY:
            return Tier.DEVICE
        profile = self._profiles.get(model)
        if profile is not None and profile.work in (Work.LOAD, Work.FILL):
            return profile.source if profile.work is Work.LOAD else Tier.DISK
        image_bytes = self.image_bytes(model)
        return Tier.HOST if 0 < image_bytes <= self.host.held_bytes(model) else Tier.DISK

    def known_models(self) -> list[str]:
        """Models that are not on disk alone."""
        return list(dict.fromkeys([*self._residents, *self.host.holders(), *self.device.kept_models()]))

    def models_in(self, state: State) -> list[str]:
        """Models in `state`, oldest first."""
        return [each.model for each in self._residents.values() if each.phase.state is state]

    def is_pinned(self, model: str) -> bool:
        """Whether `model` is never evicted and never expires."""
        resident = self._residents.get(model)
        return resident is not None and resident.is_pinned

    def image_bytes(self, model: str) -> int:
        """Host memory that all of `model` takes; 0 while that is not known, or without a host tier."""
        profile = self._profiles.get(model)
        return 0 if profile is None else profile.image_bytes

    def num_waiting(self, model: str) -> int:
        """Requests that wait until `model` is ready."""
        resident = self._residents.get(model)
        return 0 if resident is None else len(resident.requests)

    def expires_in_s(self, model: str, now_s: float) -> float | None:
        """Seconds until idle `model` leaves; None: never, or it is not idle."""
        resident = self._residents.get(model)
        deadline_s = None if resident is None else resident.expires_at_s
        return None if deadline_s is None else max(0.0, deadline_s - now_s)
