"""An owner of the machine that does what it is told, keeps its own books, and fails when they disagree."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass

from flashtensors.errors import CheckpointError, FileChanged, TransferError
from flashtensors.residency.actions import (
    Action,
    AdmitLoad,
    AnswerFill,
    AnswerLoad,
    Drop,
    DropKept,
    Fill,
    Forget,
    RefuseRequest,
    ReportUnload,
    StartPlan,
    StartRequest,
    StopFill,
    TrimHost,
)
from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Demand, State

BUDGET = 100
HOST = 150


@dataclass
class Life:
    """What the owner holds for a model on the device."""

    demand: Demand
    flexible_bytes: int
    host_bytes: int
    """What the image may grow to."""
    num_forgotten: int = 0
    """How often the model had been forgotten when it was planned."""
    is_ready: bool = False
    has_landed: bool = False

    @property
    def num_bytes(self) -> int:
        return self.demand.fixed_bytes + self.flexible_bytes


class FakeOwner:
    """Every promise of the machine, checked against books that it does not see."""

    def __init__(self, machine: Residency, demands: dict[str, Demand]) -> None:
        self.machine = machine
        self.demands = demands
        self.now_s = 0.0
        self.planning: list[str] = []
        self.planned: set[str] = set()
        self.lives: dict[str, Life] = {}
        self.kept: dict[str, int] = {}
        self.num_forgotten: Counter[str] = Counter()
        self.kept_of: dict[str, int] = {}
        """How often the model had been forgotten when a kept cache's life began."""
        self.images: Counter[str] = Counter()
        self.fills: dict[str, int] = {}
        self.stopped: set[str] = set()
        self.dropping: dict[str, bool] = {}
        self.leases: Counter[str] = Counter()
        self.waiting: dict[str, tuple[str, float]] = {}
        self.waited: list[float] = []
        self.open_loads: dict[int, str] = {}
        self.open_fills: dict[int, str] = {}
        self.open_unloads: dict[int, str] = {}
        self.num_tickets = 0
        self.num_admitted = 0
        self.refused: list[str] = []

    def ticket(self) -> int:
        self.num_tickets += 1
        return self.num_tickets

    def is_moving(self, model: str) -> bool:
        return model in self.fills or (model in self.lives and not self.lives[model].has_landed)

    # What callers do.

    def request(self, model: str) -> str:
        name = f"r{self.ticket()}"
        self.waiting[name] = model, self.now_s
        self.take(self.machine.request(name, model, self.now_s))
        return name

    def give_up(self, name: str) -> None:
        model, _since_s = self.waiting.pop(name)
        self.take(self.machine.give_up(name, model, self.now_s))

    def finish(self, model: str) -> None:
        self.leases[model] -= 1
        self.take(self.machine.finish(model, self.now_s))

    def load(self, model: str, *, is_pinned: bool = False) -> None:
        ticket = self.ticket()
        self.open_loads[ticket] = model
        self.take(self.machine.load(ticket, model, self.now_s, is_pinned=is_pinned))

    def prefetch(self, model: str) -> None:
        ticket = self.ticket()
        self.open_fills[ticket] = model
        self.take(self.machine.prefetch(ticket, model, self.now_s))

    def break_down(self, model: str) -> None:
        running, self.leases[model] = self.leases[model], 0
        self.take(self.machine.broken(model, TransferError("a step failed"), self.now_s))
        for _ in range(running):
            self.take(self.machine.finish(model, self.now_s))

    def unload(self, model: str) -> None:
        ticket = self.ticket()
        self.open_unloads[ticket] = model
        self.take(self.machine.unload(ticket, model, self.now_s))

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.take(self.machine.tick(self.now_s))

    # What the owner's threads report.

    def end_plan(self, model: str, *, fails: bool = False) -> None:
        self.planning.remove(model)
        if fails:
            self.take(self.machine.failed(model, CheckpointError("damaged"), self.now_s, host_bytes=self.images[model]))
            return
        self.planned.add(model)
        demand = self.demands[model]
        self.take(self.machine.planned(model, demand, self.now_s, image_bytes=demand.fixed_bytes))

    def get_ready(self, model: str, unused: int = 0) -> None:
        life = self.lives[model]
        life.is_ready = True
        life.flexible_bytes = max(life.demand.min_flexible_bytes, life.flexible_bytes - unused)
        self.take(self.machine.ready(model, life.flexible_bytes, self.now_s))

    def land(self, model: str) -> None:
        life = self.lives[model]
        life.has_landed = True
        self.images[model] = min(life.host_bytes, life.demand.fixed_bytes)
        self.take(self.machine.landed(model, self.now_s, host_bytes=self.images[model]))

    def fail_load(self, model: str, share: float, *, has_changed: bool = False) -> None:
        life = self.lives[model]
        life.has_landed = True
        self.images[model] = max(self.images[model], int(min(life.host_bytes, life.demand.fixed_bytes) * share))
        if not life.is_ready:
            del self.lives[model]
        running, self.leases[model] = self.leases[model], 0
        error = FileChanged("replaced") if has_changed else TransferError("disk on fire")
        self.take(self.machine.failed(model, error, self.now_s, host_bytes=self.images[model]))
        for _ in range(running):
            self.take(self.machine.finish(model, self.now_s))

    def end_fill(self, model: str, share: float, *, fails: bool = False, has_changed: bool = False) -> None:
        host_bytes = self.fills.pop(model)
        self.stopped.discard(model)
        self.images[model] = max(self.images[model], int(host_bytes * share))
        if fails:
            error = FileChanged("replaced") if has_changed else TransferError("disk on fire")
            self.take(self.machine.failed(model, error, self.now_s, host_bytes=self.images[model]))
        else:
            self.take(self.machine.filled(model, self.now_s, host_bytes=self.images[model]))

    def end_drop(self, model: str) -> None:
        keeps_kv = self.dropping.pop(model)
        life = self.lives.pop(model)
        kept_bytes = life.flexible_bytes if keeps_kv else 0
        if kept_bytes:
            self.kept[model] = kept_bytes
            self.kept_of[model] = life.num_forgotten
        self.take(self.machine.dropped(model, self.now_s, kept_bytes=kept_bytes))

    # What the machine decides.

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            self._obey(action)
            self.check()
        self.check_books()

    def _obey(self, action: Action) -> None:
        match action:
            case StartPlan(model=model):
                assert model not in self.planning, "planned twice at a time"
                assert model not in self.planned, "planned though the plan is known"
                assert not self.is_moving(model)
                self.planning.append(model)
            case AdmitLoad(model=model, flexible_bytes=flexible_bytes, host_bytes=host_bytes, uses_kept_kv=uses_kept):
                self._admit(model, flexible_bytes, host_bytes, uses_kept=uses_kept)
            case Fill(model=model, host_bytes=host_bytes):
                assert model in self.planned
                assert not self.is_moving(model)
                assert self.images[model] <= host_bytes <= self.demands[model].fixed_bytes
                assert not self.fills, "the disk serves one prefetch after the other"
                self.fills[model] = host_bytes
            case StopFill(model=model):
                assert model in self.fills
                assert model not in self.stopped, "stopped once"
                self.stopped.add(model)
            case TrimHost(model=model, keep_bytes=keep_bytes):
                assert not self.is_moving(model), "an image is cut while it is read"
                assert model not in self.planning, "an image is cut while it is looked for"
                assert keep_bytes < self.images[model]
                self.images[model] = keep_bytes
            case Forget(model=model):
                assert model not in self.planning
                assert not self.is_moving(model)
                self.num_forgotten[model] += 1
                self.planned.discard(model)
                self.images[model] = 0
            case Drop(model=model, keeps_kv=keeps_kv):
                assert self.leases[model] == 0, "a model with work in flight is dropped"
                assert self.lives[model].is_ready
                assert self.lives[model].has_landed, "dropped while its bytes move"
                assert model not in self.dropping
                self.dropping[model] = keeps_kv
            case DropKept(model=model):
                del self.kept[model]
            case _:
                self._hear(action)

    def _admit(self, model: str, flexible_bytes: int, host_bytes: int, *, uses_kept: bool) -> None:
        demand = self.demands[model]
        assert model in self.planned
        assert model not in self.planning
        assert model not in self.lives, "one load at a time"
        assert not self.is_moving(model)
        assert demand.min_flexible_bytes <= flexible_bytes <= demand.max_flexible_bytes
        assert flexible_bytes % demand.step_bytes == 0
        assert uses_kept is (model in self.kept)
        if uses_kept:
            assert flexible_bytes == self.kept.pop(model)
            assert self.kept_of[model] == self.num_forgotten[model], "a cache of other weights"
        assert self.images[model] <= host_bytes <= demand.fixed_bytes
        self.lives[model] = Life(demand, flexible_bytes, host_bytes, self.num_forgotten[model])
        self.num_admitted += 1

    def _hear(self, action: Action) -> None:
        match action:
            case StartRequest(ticket=name, model=model):
                wanted, since_s = self.waiting.pop(name)
                assert wanted == model
                assert self.lives[model].is_ready
                assert model not in self.dropping
                self.leases[model] += 1
                self.waited.append(self.now_s - since_s)
            case RefuseRequest(ticket=name, model=model):
                assert self.waiting.pop(name)[0] == model
                self.refused.append(name)
            case AnswerLoad(ticket=ticket, model=model, error=error):
                assert self.open_loads.pop(ticket) == model, "answered once, by the right model"
                if error is None:
                    assert self.lives[model].has_landed
            case AnswerFill(ticket=ticket, model=model, host_bytes=host_bytes, error=error):
                assert self.open_fills.pop(ticket) == model
                assert error is not None or host_bytes == self.images[model]
            case ReportUnload(ticket=ticket, model=model):
                if ticket is not None:
                    assert self.open_unloads.pop(ticket) == model
            case _:
                raise AssertionError(f"unknown action {action}")

    # What always holds.

    def check(self) -> None:
        held_bytes = sum(life.num_bytes for life in self.lives.values()) + sum(self.kept.values())
        assert held_bytes <= self.machine.device.capacity_bytes
        growing = {model: life.host_bytes for model, life in self.lives.items() if not life.has_landed} | self.fills
        assert sum((self.images | Counter(growing)).values()) <= self.machine.host.capacity_bytes

    def check_books(self) -> None:
        held_bytes = sum(life.num_bytes for life in self.lives.values()) + sum(self.kept.values())
        assert self.machine.device.free_bytes == self.machine.device.capacity_bytes - held_bytes
        for model in +self.leases:
            assert self.machine.state(model) in (State.READY, State.UNLOADING)
            assert model in self.lives
        deadline_s = self.machine.next_deadline_s()
        assert deadline_s is None or deadline_s > self.now_s

    # To the end.

    def finish_everything(self) -> None:
        """Let all threads end and all requests finish; then everybody must have been answered."""
        for _ in range(2000):
            if not self.advance():
                break
        assert not self.waiting, "a request is never answered"
        assert not self.open_loads, "a load is never answered"
        assert not self.open_fills, "a prefetch is never answered"
        assert not self.open_unloads, "an unload is never answered"

    def advance(self) -> bool:
        """Let one thing end; False when nothing is left to."""
        moving = [model for model, life in self.lives.items() if not life.has_landed]
        if self.planning:
            self.end_plan(self.planning[0])
        elif self.fills:
            self.end_fill(next(iter(self.fills)), 1.0)
        elif moving and not self.lives[moving[0]].is_ready:
            self.get_ready(moving[0])
        elif moving:
            self.land(moving[0])
        elif self.dropping:
            self.end_drop(next(iter(self.dropping)))
        elif self.leases.total():
            self.finish(next(self.leases.elements()))
        elif self.waiting or self.open_loads or self.open_fills or self.open_unloads:
            deadline_s = self.machine.next_deadline_s()
            assert deadline_s is not None, "it waits for nothing"
            self.pass_time(deadline_s - self.now_s)
        else:
            return False
        return True


def random_demand(rng: random.Random) -> Demand:
    """Mostly a model that fits with one or two others; now and then one that fits nowhere."""
    step_bytes = rng.choice([1, 1, 5])
    fixed_bytes = rng.choice([rng.randint(1, 60), rng.randint(1, 40), rng.randint(1, 120)])
    low = rng.randint(0, 4) * step_bytes
    return Demand(
        fixed_bytes=fixed_bytes,
        min_flexible_bytes=low,
        max_flexible_bytes=low + rng.randint(0, 60),
        step_bytes=step_bytes,
    )


def exponential(rng: random.Random, rate_per_s: float) -> float:
    """Seconds until the next of a Poisson process."""
    return -math.log(1.0 - rng.random()) / rate_per_s
