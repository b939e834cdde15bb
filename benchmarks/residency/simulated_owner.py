"""An owner of the residency machine whose disk, link and device are numbers: hours of traffic in seconds.

Disk and link carry one load after the other. A model's requests start when the machine says so, have their first token
once the model has landed, and then run side by side.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.residency.waiting_bound import find_patience_s
from benchmarks.residency.zipf_trace import Arrival
from flashtensors.residency.actions import (
    Action,
    AdmitLoad,
    Drop,
    DropKept,
    RefuseRequest,
    StartPlan,
    StartRequest,
    TrimHost,
)
from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Demand, State, Tier

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Sizes and speeds."""

    weight_bytes: int = GB // 2
    """Of every model, at most."""
    weights: tuple[int, ...] = ()
    """Of each model, the most popular first; empty: all have `weight_bytes`."""
    kv_bytes: int = GB // 2
    """Of every model: no more and no less."""
    device_bytes: int = 12 * GB
    host_bytes: int = 24 * GB
    disk_bytes_per_s: float = 3e9
    link_bytes_per_s: float = 55e9
    plan_s: float = 0.002
    drop_s: float = 0.001
    first_token_s: float = 0.01
    answer_s: float = 0.16
    """From the first token to the last."""
    hold_s: float = 0.0
    """How long the first request for a model that is not there is held back, so that others for it may join."""

    def bytes_of(self, model: str) -> int:
        """Weights of the model that the owner calls `m` and its rank."""
        return self.weights[int(model[1:])] if self.weights else self.weight_bytes

    @property
    def num_places(self) -> int:
        """Models that fit at once, where all are equal."""
        return self.device_bytes // (self.weight_bytes + self.kv_bytes)


@dataclass
class Outcome:
    """What became of a trace."""

    num_swaps: int = 0
    disk_bytes: int = 0
    tier_waits_s: dict[Tier, list[float]] = field(default_factory=lambda: {tier: [] for tier in Tier})
    """Seconds to the first token, by where the model was when its request came."""
    waits: list[tuple[float, int]] = field(default_factory=list)
    """Of every request: seconds to the first token, and the loads that began meanwhile."""
    bounds_s: list[float] = field(default_factory=list)
    """Of every request: what the machine promised that it would not wait beyond; see `waiting_bound`."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """How things stood when a request came."""

    time_s: float
    tier: Tier
    num_swaps: int
    num_landed: int


class SimulatedOwner:
    """Obeys one machine, and fails where what it is told does not fit the memory that there is.

    Args:
        machine: Sizes and speeds.
        residency: Decides.
        patience_s: What `residency` was made with.
    """

    def __init__(self, machine: Machine, residency: Residency, *, patience_s: float | None = None) -> None:
        self.outcome = Outcome()
        self._machine, self._residency = machine, residency
        self._patience_s = patience_s
        self._patiences_s = [self._find_patience_s()]
        """Of a model on disk, after each load: loads move the rates that it follows from."""
        self._num_landed = 0
        self._events: list[tuple[float, int, Callable[[], list[Action]]]] = []
        self._order = itertools.count()
        self._now_s = 0.0
        self._disk_free_s = self._link_free_s = 0.0
        self._device: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._host: dict[str, int] = {}
        self._landed_s: dict[str, float] = {}
        self._asked: dict[str, _Asked] = {}
        self._held_until_s: dict[str, float] = {}

    def run(self, trace: Sequence[Arrival]) -> Outcome:
        """Every request of `trace`, until the last has been answered."""
        for index, arrival in enumerate(trace):
            self._at(arrival.time_s, lambda index=index, arrival=arrival: self._ask(f"r{index}", f"m{arrival.model}"))
        deadline_s = None
        while self._events or deadline_s is not None:
            if self._events and (deadline_s is None or self._events[0][0] <= deadline_s):
                self._now_s, _, happen = heapq.heappop(self._events)
                self._obey(happen())
            elif deadline_s is not None:
                self._now_s = max(self._now_s, deadline_s)
                self._obey(self._residency.tick(self._now_s))
            deadline_s = self._residency.next_deadline_s()
            if not self._events and not self._asked:
                break  # only keep-alives are left
        assert not self._asked, f"never answered: {sorted(self._asked)[:5]}"
        return self.outcome

    def _at(self, time_s: float, happen: Callable[[], list[Action]]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen))

    def _ask(self, ticket: str, model: str) -> list[Action]:
        self._asked[ticket] = _Asked(self._now_s, self._tier(model), self.outcome.num_swaps, self._num_landed)
        if self._machine.hold_s and self._residency.state(model) is State.ABSENT:
            if self._held_until_s.get(model, 0.0) <= self._now_s:
                self._held_until_s[model] = self._now_s + self._machine.hold_s
            self._at(self._held_until_s[model], lambda: self._residency.request(ticket, model, self._now_s))
            return []
        return self._residency.request(ticket, model, self._now_s)

    def _tier(self, model: str) -> Tier:
        if self._residency.state(model) is State.READY:
            return Tier.DEVICE
        return Tier.HOST if self._host.get(model, 0) >= self._machine.bytes_of(model) else Tier.DISK

    def _obey(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartPlan(model=model):
                    self._at(self._now_s + self._machine.plan_s, lambda model=model: self._plan(model))
                case AdmitLoad():
                    self._load(action)
                case Drop(model=model, keeps_kv=keeps_kv):
                    self._at(
                        self._now_s + self._machine.drop_s, lambda model=model, keeps=keeps_kv: self._drop(model, keeps)
                    )
                case DropKept(model=model):
                    del self._kept[model]
                case TrimHost(model=model, keep_bytes=keep_bytes):
                    self._host[model] = min(self._host.get(model, 0), keep_bytes)
                case StartRequest(ticket=ticket, model=model):
                    self._start(ticket, model)
                case RefuseRequest(ticket=ticket, error=error):
                    raise AssertionError(f"{ticket} was refused: {error}")
                case _:
                    pass

    def _plan(self, model: str) -> list[Action]:
        weight_bytes, kv_bytes = self._machine.bytes_of(model), self._machine.kv_bytes
        demand = Demand(fixed_bytes=weight_bytes, min_flexible_bytes=kv_bytes, max_flexible_bytes=kv_bytes)
        return self._residency.planned(model, demand, self._now_s, image_bytes=weight_bytes)

    def _load(self, action: AdmitLoad) -> None:
        machine, model = self._machine, action.model
        weight_bytes = machine.bytes_of(model)
        assert model not in self._device, "one life at a time"
        if action.uses_kept_kv:
            del self._kept[model]
        self._device[model] = weight_bytes + action.flexible_bytes
        assert sum(self._device.values()) + sum(self._kept.values()) <= machine.device_bytes
        disk_bytes = weight_bytes - self._host.get(model, 0)
        self._host[model] = max(self._host.get(model, 0), action.host_bytes)
        assert sum(self._host.values()) <= machine.host_bytes
        read_s = self._now_s
        if disk_bytes:
            read_s = self._disk_free_s = max(self._now_s, self._disk_free_s) + disk_bytes / machine.disk_bytes_per_s
        self._link_free_s = max(self._now_s, self._link_free_s) + weight_bytes / machine.link_bytes_per_s
        landed_s = self._landed_s[model] = max(read_s, self._link_free_s)
        self.outcome.num_swaps += 1
        self.outcome.disk_bytes += disk_bytes
        self._at(read_s, lambda: self._residency.ready(model, action.flexible_bytes, self._now_s))
        self._at(landed_s, lambda started_s=self._now_s: self._land(model, disk_bytes, started_s))

    def _land(self, model: str, disk_bytes: int, started_s: float) -> list[Action]:
        num_bytes, seconds = self._machine.bytes_of(model), self._now_s - started_s
        self._residency.rates.observe(disk_bytes=disk_bytes, num_bytes=num_bytes, seconds=seconds)
        self._num_landed += 1
        self._patiences_s.append(self._find_patience_s())
        return self._residency.landed(model, self._now_s, host_bytes=self._host.get(model, 0))

    def _drop(self, model: str, keeps_kv: bool) -> list[Action]:
        kept_bytes = self._device.pop(model) - self._machine.bytes_of(model) if keeps_kv else 0
        if keeps_kv:
            self._kept[model] = kept_bytes
        else:
            self._device.pop(model, None)
        return self._residency.dropped(model, self._now_s, kept_bytes=kept_bytes)

    def _start(self, ticket: str, model: str) -> None:
        asked = self._asked.pop(ticket)
        assert model in self._device, "a request for a model that is not there was started"
        first_s = max(self._now_s, self._landed_s[model]) + self._machine.first_token_s
        wait_s = first_s - asked.time_s
        self.outcome.tier_waits_s[asked.tier].append(wait_s)
        self.outcome.waits.append((wait_s, self.outcome.num_swaps - asked.num_swaps))
        self.outcome.bounds_s.append(self._bound_s(asked))
        self._at(first_s + self._machine.answer_s, lambda: self._residency.finish(model, self._now_s))

    def _find_patience_s(self) -> float:
        return find_patience_s(self._residency.rates, self._machine.weight_bytes, self._patience_s)

    def _bound_s(self, asked: _Asked) -> float:
        """The promise; see `waiting_bound`."""
        machine = self._machine
        patience_s = max(self._patiences_s[asked.num_landed :])
        answer_s = machine.first_token_s + machine.answer_s
        load_s = machine.weight_bytes / machine.disk_bytes_per_s + machine.weight_bytes / machine.link_bytes_per_s
        num_loads = self.outcome.num_swaps - asked.num_landed
        own_s = machine.hold_s + machine.plan_s + machine.first_token_s
        return own_s + patience_s + answer_s + num_loads * (load_s + machine.drop_s + answer_s)
