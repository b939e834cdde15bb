"""The books that the parts of the machine share: models, memory, the time, and what the owner shall do."""

from __future__ import annotations

from .actions import Action, StartPlan, TrimHost
from .device_room import DeviceRoom
from .host_room import HostRoom, Image
from .profile import Profile, Work
from .rates import Rates
from .resident import Phase, Resident

DISK_FACTOR = 2.0
"""What a model that must be read from the disk again counts in evictions, at most, against one from host memory.

The disk takes some 18 times as long, but to spare models for that lets popular ones, which host memory has, come and go
for the sake of rare ones. With a hundred models by Zipf's law, by `benchmarks/residency/bench_eviction_cost.py`, all of
the disk's time makes the mean wait 11 % shorter and swaps 41 % more; a factor of 2 leaves both as they are with none of
it, and settles it for models that are wanted about as often.
"""


class Ledger:
    """State of the machine.

    Args:
        device: The device's memory.
        host: Host memory.
        rates: What bringing a model back costs.
    """

    def __init__(self, device: DeviceRoom, host: HostRoom, rates: Rates) -> None:
        self.device = device
        self.host = host
        self.rates = rates
        self.profiles: dict[str, Profile] = {}
        """Every model that was ever asked for and not forgotten."""
        self.residents: dict[str, Resident] = {}
        """Models on the device, on their way there, or leaving."""
        self.now_s = 0.0
        self._actions: list[Action] = []

    def act(self, action: Action) -> None:
        """Add to what the owner shall do."""
        self._actions.append(action)

    def take_actions(self) -> list[Action]:
        """Hand over what the owner shall do."""
        actions, self._actions = self._actions, []
        return actions

    def profile(self, model: str) -> Profile:
        """What is known of `model`, from now on at the latest."""
        return self.profiles.setdefault(model, Profile(model))

    def plan(self, profile: Profile) -> None:
        """Have the model's files planned."""
        assert profile.work is None, f"{profile.model} is busy with {profile.work}"
        profile.work = Work.PLAN
        self.act(StartPlan(profile.model))

    def swap_seconds(self, profile: Profile) -> float:
        """Seconds that it takes to bring the model to the device, once there is room."""
        num_bytes = profile.image_bytes or (profile.demand.fixed_bytes if profile.demand else 0)
        return self.rates.seconds_to_load(num_bytes, self.host.held_bytes(profile.model))

    def eviction_cost(self, profile: Profile) -> float:
        """Expected seconds of swapping per second if the model left the device.

        Seconds from where its bytes are now, but no more than `DISK_FACTOR` times those from host memory.
        """
        num_bytes = profile.demand.fixed_bytes if profile.demand else 0
        seconds = self.rates.seconds_to_load(num_bytes, self.host.held_bytes(profile.model))
        seconds = min(seconds, DISK_FACTOR * self.rates.seconds_to_load(num_bytes, num_bytes))
        return seconds * profile.popularity.rate_per_s(self.now_s)

    def num_wanted(self) -> int:
        """Models that were asked for lately: as many as should share the device."""
        return sum(profile.popularity.is_wanted(self.now_s) for profile in self.profiles.values())

    def grow_image(self, profile: Profile, *, is_forced: bool = False) -> int:
        """Reserve host memory for the model's image, at the cost of images that are worth less.

        Args:
            profile: Of the model.
            is_forced: A caller asked for it: images that are worth more give way too.

        Returns:
            Bytes that the image may grow to.
        """
        worth = self._image_worth(profile)
        rivals = [self._image(model) for model in self.host.holders() if self._may_shrink(model, profile)]
        if not is_forced:
            rivals = [rival for rival in rivals if rival.worth < worth]
        for victim, keep_bytes in self.host.grow(profile.model, profile.image_bytes, rivals):
            self.act(TrimHost(victim, keep_bytes))
        return self.host.held_bytes(profile.model)

    def _may_shrink(self, model: str, winner: Profile) -> bool:
        """Whether an image may be cut now: nobody reads to it, or looks for what was left of it."""
        return model != winner.model and self.profiles[model].work is None

    def _image(self, model: str) -> Image:
        profile = self.profiles[model]
        return Image(model, profile.image_bytes, self._image_worth(profile))

    def _image_worth(self, profile: Profile) -> float:
        """Expected uses per second; none for a model that never leaves the device."""
        resident = self.residents.get(profile.model)
        if resident is not None and resident.is_pinned and resident.phase is Phase.READY:
            return 0.0
        return profile.popularity.rate_per_s(self.now_s)
