"""Who comes to the device next, and who makes room.

Loads are served in the order in which their oldest waiter came. For the first of them that lacks room

1. KV caches of models that have left are dropped, then idle models leave, those that cost least first;
2. where that is not enough, models with work in flight go on taking requests until they idle, or until the oldest
   waiter has waited for `patience_s`: then as many as are needed take no new requests, finish what runs, and leave.

So two busy models that do not fit together take turns instead of evicting each other for every request, and nobody
waits longer than the patience, the answers that run then, and the loads of those who came before.

While the first one is patient, one behind it may take memory that the first will not need. Models that left for a load
that then failed come last, and only where there is room.
"""

from __future__ import annotations

from ..errors import CapacityError
from .actions import AdmitLoad, DropKept
from .ledger import Ledger
from .policy import Candidate, choose_victims
from .profile import Work
from .resident import Phase, Resident
from .tiers import Demand, Tier

LEAST_PATIENCE_S = 0.5
PATIENCE_IN_SWAPS = 4.0
"""Patience relates to what the swap costs: a model that stays for this many swaps serves four fifths of the time."""


class Admission:
    """Serves the queue of loads.

    Args:
        ledger: The books.
        patience_s: How long a load waits before models with work in flight must make room; None:
            `PATIENCE_IN_SWAPS` times what the swap takes, at least `LEAST_PATIENCE_S`.
    """

    def __init__(self, ledger: Ledger, patience_s: float | None) -> None:
        self._ledger = ledger
        self._patience_s = patience_s

    def patience_s(self, resident: Resident) -> float:
        """How long `resident` lets models with work in flight go on."""
        if self._patience_s is not None:
            return self._patience_s
        return max(LEAST_PATIENCE_S, PATIENCE_IN_SWAPS * self._ledger.swap_seconds(resident.profile))

    def next_deadline_s(self) -> float | None:
        """When time changes what can be done for the queue."""
        queue = self._queue()
        if not queue:
            return None
        now_s, ready = self._ledger.now_s, self._ledger.residents.values()
        deadlines = [queue[0].waited_since_s + self.patience_s(queue[0])]
        deadlines += [each.promised_until_s for each in ready if each.phase is Phase.READY]
        return min((deadline_s for deadline_s in deadlines if deadline_s > now_s), default=None)

    def serve(self) -> list[tuple[Resident, CapacityError]]:
        """Admit loads as far as there is room, and make room for the first that lacks it.

        Returns:
            Those that can never be admitted, and why.
        """
        refused: list[tuple[Resident, CapacityError]] = []
        spare_bytes: int | None = None  # beyond what the first in line will need; None: nobody waits in front
        for resident in self._queue():
            demand = resident.profile.demand
            assert demand is not None, "only planned models are in the queue"
            if demand.min_bytes > self._capacity_bytes():
                refused.append((resident, self._capacity_error(resident.model, demand)))
                continue
            if resident.is_wanted and spare_bytes is None and not self._has_room(resident, demand):
                spare_bytes = self._make_room(resident, demand)
            if self._has_room(resident, demand, spare_bytes):
                taken_bytes = self._admit(resident, demand, spare_bytes)
                spare_bytes = None if spare_bytes is None else spare_bytes - taken_bytes
            elif not resident.is_wanted:  # it was to come back after a load that failed, but others took the room
                resident.leave("")
        return refused

    def keeps_kv(self, resident: Resident) -> bool:
        """Whether the KV cache of a model that leaves may stay on the device."""
        device, num_bytes = self._ledger.device, resident.flexible_bytes
        pending_bytes = sum(each.flexible_bytes for each in self._ledger.residents.values() if each.keeps_kv)
        if resident.reason != "evicted" or resident.is_outdated or not device.may_keep(num_bytes, pending_bytes):
            return False
        queue = self._queue()
        if not queue or queue[0].profile.demand is None:
            return True
        leaving_bytes = self._leaving_bytes()  # this one's among them
        need_bytes = device.need_bytes(queue[0].model, queue[0].profile.demand)
        return device.free_bytes + leaving_bytes - num_bytes >= need_bytes

    def _queue(self) -> list[Resident]:
        waiting = [each for each in self._ledger.residents.values() if each.phase is Phase.QUEUED]
        return sorted(waiting, key=lambda each: each.waited_since_s)

    # Room.

    def _has_room(self, resident: Resident, demand: Demand, spare_bytes: int | None = None) -> bool:
        device = self._ledger.device
        available_bytes = device.free_bytes if spare_bytes is None else min(device.free_bytes, spare_bytes)
        return device.need_bytes(resident.model, demand) <= available_bytes

    def _make_room(self, resident: Resident, demand: Demand) -> int | None:
        """Free memory for the first in line.

        Returns:
            Bytes that those behind it may take; None when it has room at once.
        """
        device = self._ledger.device
        if device.kept_bytes(resident.model) and not self._could_fit_beside_kept(resident, demand):
            self._drop_kept(resident.model)
        coming_bytes = device.free_bytes + self._leaving_bytes() - device.need_bytes(resident.model, demand)
        if coming_bytes >= 0:
            return None if self._has_room(resident, demand) else coming_bytes
        now_s = self._ledger.now_s
        has_patience = now_s < resident.waited_since_s + self.patience_s(resident)
        kept = [self._kept_candidate(model) for model in device.kept_models() if model != resident.model]
        idle, busy = self._candidates()
        kept_bytes = sum(each.num_bytes for each in kept)
        lacking_bytes = -coming_bytes - kept_bytes
        victims = choose_victims(idle, lacking_bytes)
        is_enough = lacking_bytes <= 0 or bool(victims)
        if not is_enough:
            victims = _choose_idle_first(idle, busy, lacking_bytes)
            is_enough = bool(victims) and not has_patience
        if is_enough:
            for each in choose_victims(kept, min(-coming_bytes, kept_bytes)):
                self._drop_kept(each.model)
            for each in victims:
                self._ledger.residents[each.model].leave("evicted")
                resident.victims.append(self._ledger.residents[each.model])
            return None if self._has_room(resident, demand) else 0
        freed_bytes = sum(each.num_bytes for each in victims)
        return max(0, freed_bytes - lacking_bytes) if has_patience and victims else 0

    def _candidates(self) -> tuple[list[Candidate], list[Candidate]]:
        """Models that may be asked to leave: those that idle, and those with work in flight."""
        ledger = self._ledger
        idle: list[Candidate] = []
        busy: list[Candidate] = []
        for each in ledger.residents.values():
            is_promised = bool(each.loads) or ledger.now_s < each.promised_until_s
            if each.phase is not Phase.READY or each.is_pinned or is_promised:
                continue
            cost = ledger.eviction_cost(each.profile)
            candidate = Candidate(each.model, ledger.device.held_bytes(each.model), cost, each.last_used_s)
            (busy if each.num_leases else idle).append(candidate)
        return idle, busy

    def _kept_candidate(self, model: str) -> Candidate:
        ledger = self._ledger
        rate_per_s = ledger.profiles[model].popularity.rate_per_s(ledger.now_s)
        return Candidate(model, ledger.device.kept_bytes(model), rate_per_s, 0.0)

    def _drop_kept(self, model: str) -> None:
        self._ledger.device.drop_kept(model)
        self._ledger.act(DropKept(model))

    def _leaving_bytes(self) -> int:
        """Bytes of models that leave once their requests have ended."""
        ledger = self._ledger
        leaving = (each.model for each in ledger.residents.values() if each.phase is Phase.LEAVING)
        return sum(map(ledger.device.held_bytes, leaving))

    def _could_fit_beside_kept(self, resident: Resident, demand: Demand) -> bool:
        kept_bytes = self._ledger.device.kept_bytes(resident.model)
        return demand.fixed_bytes + kept_bytes <= self._capacity_bytes()

    def _capacity_bytes(self) -> int:
        """Bytes that could be free one day: all but what pinned models hold for good."""
        ledger = self._ledger
        pinned = (each for each in ledger.residents.values() if each.is_pinned and each.phase is not Phase.LEAVING)
        return ledger.device.capacity_bytes - sum(ledger.device.held_bytes(each.model) for each in pinned)

    # Decisions.

    def _admit(self, resident: Resident, demand: Demand, spare_bytes: int | None) -> int:
        """Reserve memory and have the model loaded; returns the bytes that it takes of those that were free."""
        ledger, profile = self._ledger, resident.profile
        free_bytes = ledger.device.free_bytes
        available_bytes = free_bytes if spare_bytes is None else min(free_bytes, spare_bytes)
        fair_bytes = ledger.device.capacity_bytes // max(1, ledger.num_wanted())
        flexible_bytes, uses_kept = ledger.device.admit(resident.model, demand, available_bytes, fair_bytes)
        is_hot = 0 < profile.image_bytes <= ledger.host.held_bytes(resident.model)
        profile.work, profile.source = Work.LOAD, Tier.HOST if is_hot else Tier.DISK
        resident.phase, resident.flexible_bytes = Phase.MOVING, flexible_bytes
        host_bytes = ledger.grow_image(profile)
        waited_s = max(0.0, ledger.now_s - resident.waited_since_s)
        ledger.act(AdmitLoad(resident.model, flexible_bytes, host_bytes, uses_kept, profile.source, waited_s))
        return free_bytes - ledger.device.free_bytes

    def _capacity_error(self, model: str, demand: Demand) -> CapacityError:
        capacity_bytes = self._ledger.device.capacity_bytes
        pinned_bytes = capacity_bytes - self._capacity_bytes()
        pinned = f", of which pinned models hold {pinned_bytes}" if pinned_bytes else ""
        return CapacityError(
            f"{model} needs {demand.fixed_bytes} bytes for weights and at least {demand.min_flexible_bytes} for its "
            f"KV cache, but the device's budget is {capacity_bytes}{pinned}; "
            "raise gpu_memory_utilization (on CPU mem_pool_size), lower max_model_len, or take a smaller model"
        )


def _choose_idle_first(idle: list[Candidate], busy: list[Candidate], num_bytes: int) -> list[Candidate]:
    """All that idle, and of the busy ones those that cost least; empty when all together free less."""
    missing_bytes = num_bytes - sum(each.num_bytes for each in idle)
    chosen = choose_victims(busy, missing_bytes)
    return [*idle, *chosen] if chosen else []
