"""The state machine of which models are on the device. It decides; its owner does and reports back.

    ABSENT ──load──▶ LOADING ──loaded──▶ READY ──unload, eviction, keep-alive──▶ UNLOADING ──unloaded──▶ ABSENT
                        │ load_failed ▶ ABSENT            a load that arrives now starts when the model is gone ┘

Every method is one event: it takes the time, changes the state and returns the actions that follow. There is no clock,
thread or I/O in here, so tests drive it through any order of events.

A load first learns what the model demands (`planned`), then waits for room, first come first served. What it lacks is
taken from models that the policy chooses. A chosen model refuses new leases and leaves when its last one ends, so
work in flight is never cut off and a load never waits for ever behind a busy model. A model that was just promised to
a caller (its load was answered, no request has come yet) is not chosen for `promise_s`, so two models that do not fit
together cannot evict each other without serving anybody.
"""

from __future__ import annotations

from collections import deque

from ..errors import CapacityError, FlashError
from .actions import Action, AdmitLoad, AnswerLoad, Drop, ReportUnload, StartLoad
from .policy import Candidate, EvictionPolicy, LeastRecentlyUsed
from .resident import Resident, WaitingLoad
from .tiers import Demand, State, Tier, TierBudget


class Residency:
    """Models of one device: states, memory, leases, deadlines.

    Args:
        budget_bytes: Memory that weights and KV caches may take together.
        keep_alive_s: Seconds that an idle model stays; negative: for ever.
        flexible_share: Share of the free memory beside its weights that one model's KV cache may take.
        promise_s: Seconds that a model waits for the first request after its load was answered.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        keep_alive_s: float,
        flexible_share: float = 0.5,
        promise_s: float = 2.0,
        policy: EvictionPolicy | None = None,
    ) -> None:
        self._budget = TierBudget(Tier.DEVICE, budget_bytes)
        self._keep_alive_s = keep_alive_s
        self._flexible_share = flexible_share
        self._promise_s = promise_s
        self._policy = policy or LeastRecentlyUsed()
        self._residents: dict[str, Resident] = {}
        self._waiting: deque[Resident] = deque()
        self._actions: list[Action] = []
        self._now_s = 0.0

    @property
    def free_bytes(self) -> int:
        """Memory that no model holds."""
        return self._budget.free_bytes

    def state(self, model: str) -> State:
        """State of `model`."""
        resident = self._residents.get(model)
        return State.ABSENT if resident is None else resident.state

    def models_in(self, state: State) -> list[str]:
        """Models in `state`, oldest first."""
        return [resident.model for resident in self._residents.values() if resident.state is state]

    def is_pinned(self, model: str) -> bool:
        """Whether `model` is never evicted and never expires."""
        resident = self._residents.get(model)
        return resident is not None and resident.is_pinned

    def expires_in_s(self, model: str, now_s: float) -> float | None:
        """Seconds until idle `model` leaves; None: never, or it is not idle."""
        resident = self._residents.get(model)
        deadline_s = None if resident is None else resident.expires_at_s
        return None if deadline_s is None else max(0.0, deadline_s - now_s)

    def next_deadline_s(self) -> float | None:
        """When to call `tick` next; None when time changes nothing."""
        idle = [each for each in self._residents.values() if each.state is State.READY and not each.num_leases]
        deadlines = [each.expires_at_s for each in idle if each.expires_at_s is not None]
        if self._waiting:
            deadlines += [each.promised_until_s for each in idle if each.promised_until_s > self._now_s]
        return min(deadlines, default=None)

    # Events from callers.

    def load(
        self, ticket: int, model: str, now_s: float, *, keep_alive_s: float | None = None, is_pinned: bool = False
    ) -> list[Action]:
        """A caller wants `model`; its ticket is answered once."""
        load = WaitingLoad(ticket, keep_alive_s, is_pinned)
        resident = self._residents.get(model)
        if resident is None:
            self._begin(model, [load])
        else:
            resident.loads.append(load)
            if resident.state is State.READY:
                self._answer_loads(resident, now_s, was_loaded=True)
        return self._settle(now_s)

    def unload(self, ticket: int | None, model: str, now_s: float, *, reason: str = "unload") -> list[Action]:
        """A caller wants `model` gone; its ticket is answered once. Loads that still wait for it are refused."""
        resident = self._residents.get(model)
        if resident is None:
            self._actions.append(ReportUnload(ticket, model, "not_loaded"))
            return self._settle(now_s)
        if ticket is not None:
            resident.unload_tickets.append(ticket)
        self._refuse_loads(resident, CapacityError(f"{model} was unloaded while it was loading; load it again"))
        self._begin_leaving(resident, reason)
        return self._settle(now_s)

    def set_keep_alive(self, model: str, keep_alive_s: float, now_s: float) -> list[Action]:
        """Change how long idle `model` stays, counted from its last use; an absent model is ignored."""
        resident = self._residents.get(model)
        if resident is not None:
            resident.keep_alive_s = keep_alive_s
        return self._settle(now_s)

    def acquire(self, model: str, now_s: float) -> bool:
        """Take a lease for a request; False when the model is not ready, or leaving."""
        resident = self._residents.get(model)
        if resident is None or resident.state is not State.READY:
            return False
        resident.num_leases += 1
        resident.last_used_s = now_s
        resident.promised_until_s = now_s
        return True

    def release(self, model: str, now_s: float) -> list[Action]:
        """A request has ended."""
        resident = self._residents[model]
        assert resident.num_leases > 0, f"{model}: lease released twice"
        resident.num_leases -= 1
        resident.last_used_s = now_s
        return self._settle(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        return self._settle(now_s)

    # Reports of the owner.

    def planned(self, model: str, demand: Demand, now_s: float) -> list[Action]:
        """The model's files are sound, and it demands this much."""
        resident = self._residents[model]
        resident.is_owner_busy = False
        if resident.state is State.LOADING:
            resident.demand = demand
            self._waiting.append(resident)
        return self._settle(now_s)

    def loaded(self, model: str, num_bytes: int, now_s: float) -> list[Action]:
        """The model is on the device and took `num_bytes` of what was reserved."""
        resident = self._residents[model]
        resident.is_owner_busy = False
        self._budget.shrink(model, num_bytes)
        if resident.state is State.LOADING:
            resident.state = State.READY
            self._answer_loads(resident, now_s, was_loaded=False)
        return self._settle(now_s)

    def load_failed(self, model: str, error: FlashError, now_s: float) -> list[Action]:
        """The model could not be planned or read, and nothing is held for it."""
        resident = self._residents[model]
        resident.is_owner_busy = False
        if resident.state is State.LOADING:
            self._refuse_loads(resident, error)
        self._remove(resident)
        return self._settle(now_s)

    def unloaded(self, model: str, now_s: float) -> list[Action]:
        """The model was dropped."""
        self._remove(self._residents[model])
        return self._settle(now_s)

    # Decisions.

    def _settle(self, now_s: float) -> list[Action]:
        """Draw all consequences of an event and hand over the actions."""
        self._now_s = now_s
        for resident in list(self._residents.values()):
            if resident.expires_at_s is not None and now_s >= resident.expires_at_s:
                self._begin_leaving(resident, "keep_alive")
        self._serve_waiting()
        for resident in self._residents.values():
            if resident.state is State.UNLOADING and not resident.num_leases and not resident.is_owner_busy:
                resident.is_owner_busy = True
                self._actions.append(Drop(resident.model))
        actions, self._actions = self._actions, []
        return actions

    def _serve_waiting(self) -> None:
        """Admit loads in the order they came, as far as there is room; make room for the first that lacks it."""
        while self._waiting:
            resident = self._waiting[0]
            demand = resident.demand
            assert demand is not None
            if demand.min_bytes <= self._budget.free_bytes:
                self._admit(self._waiting.popleft(), demand)
            elif demand.min_bytes > self._evictable_capacity_bytes():
                self._waiting.popleft()
                self._refuse_loads(resident, self._capacity_error(resident.model, demand))
                self._remove(resident)
            else:
                self._make_room(demand.min_bytes)
                return

    def _admit(self, resident: Resident, demand: Demand) -> None:
        flexible_bytes = demand.flexible_bytes(self._budget.free_bytes, self._flexible_share)
        self._budget.reserve(resident.model, demand.fixed_bytes + flexible_bytes)
        resident.is_owner_busy = True
        self._actions.append(AdmitLoad(resident.model, flexible_bytes))

    def _make_room(self, num_bytes: int) -> None:
        residents = self._residents.values()
        leaving_bytes = sum(self._budget.held_bytes(each.model) for each in residents if each.state is State.UNLOADING)
        lacking_bytes = num_bytes - self._budget.free_bytes - leaving_bytes
        candidates = [
            Candidate(
                model=each.model,
                num_bytes=self._budget.held_bytes(each.model),
                last_used_s=each.last_used_s,
                num_leases=each.num_leases,
            )
            for each in residents
            if each.state is State.READY and not each.is_pinned and self._now_s >= each.promised_until_s
        ]
        for model in self._policy.choose(candidates, lacking_bytes):
            self._begin_leaving(self._residents[model], "evicted")

    def _evictable_capacity_bytes(self) -> int:
        """Bytes that could be free one day: all but what pinned models hold for good."""
        pinned = (each for each in self._residents.values() if each.is_pinned and each.state is not State.UNLOADING)
        return self._budget.capacity_bytes - sum(self._budget.held_bytes(each.model) for each in pinned)

    def _capacity_error(self, model: str, demand: Demand) -> CapacityError:
        capacity_bytes = self._budget.capacity_bytes
        pinned_bytes = capacity_bytes - self._evictable_capacity_bytes()
        pinned = f", of which pinned models hold {pinned_bytes}" if pinned_bytes else ""
        return CapacityError(
            f"{model} needs {demand.fixed_bytes} bytes for weights and at least {demand.min_flexible_bytes} for its "
            f"KV cache, but the device's budget is {capacity_bytes}{pinned}; "
            "raise gpu_memory_utilization (on CPU mem_pool_size), lower max_model_len, or take a smaller model"
        )

    # Lives of a model.

    def _begin(self, model: str, loads: list[WaitingLoad]) -> None:
        self._residents[model] = Resident(model, self._keep_alive_s, loads=loads)
        self._actions.append(StartLoad(model))

    def _begin_leaving(self, resident: Resident, reason: str) -> None:
        if resident.state is State.UNLOADING:
            return
        if resident in self._waiting:
            self._waiting.remove(resident)
        resident.state = State.UNLOADING
        resident.reason = reason

    def _remove(self, resident: Resident) -> None:
        """Forget the model, report it, and begin its next life where callers wait for one."""
        self._budget.release(resident.model)
        del self._residents[resident.model]
        if resident.state is State.UNLOADING:
            tickets: list[int | None] = [*resident.unload_tickets] or [None]
            for position, ticket in enumerate(tickets):
                reason = resident.reason if position == 0 else "not_loaded"
                self._actions.append(ReportUnload(ticket, resident.model, reason))
        if resident.loads:
            self._begin(resident.model, resident.loads)

    def _answer_loads(self, resident: Resident, now_s: float, *, was_loaded: bool) -> None:
        for load in resident.loads:
            resident.is_pinned = resident.is_pinned or load.is_pinned
            if load.keep_alive_s is not None:
                resident.keep_alive_s = load.keep_alive_s
            self._actions.append(AnswerLoad(load.ticket, resident.model, was_loaded))
            was_loaded = True
        resident.loads.clear()
        resident.last_used_s = now_s
        resident.promised_until_s = now_s + self._promise_s

    def _refuse_loads(self, resident: Resident, error: FlashError) -> None:
        for load in resident.loads:
            self._actions.append(AnswerLoad(load.ticket, resident.model, error=error))
        resident.loads.clear()
