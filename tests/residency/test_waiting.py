"""Random traffic on a fake clock with fake links: nobody waits beyond the bound, and swaps stay few."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from flashtensors.residency.actions import Action, AdmitLoad, Drop, StartPlan, StartRequest
from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Demand

from .fake_owner import FakeOwner, exponential

PLAN_S = 0.05
LONGEST_LOAD_S = 0.6
LONGEST_ANSWER_S = 2.0
PATIENCE_S = 1.5
PROMISE_S = 1.0


class Traffic(FakeOwner):
    """An owner whose threads and answers take time, and some of whose loads fail."""

    def __init__(self, machine: Residency, demands: dict[str, Demand], rng: random.Random, fail_share: float) -> None:
        super().__init__(machine, demands)
        self.longest_answer_s = LONGEST_ANSWER_S
        self._rng = rng
        self._fail_share = fail_share
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._loads_before: dict[str, int] = {}

    def at(self, delay_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), happen))

    def run(self) -> None:
        """Until nothing is to come but what time brings to idle models."""
        while self._events or self.waiting:
            deadline_s = self.machine.next_deadline_s()
            if self._events and (deadline_s is None or self._events[0][0] <= deadline_s):
                self.now_s, _, happen = heapq.heappop(self._events)
                happen()
            else:
                assert deadline_s is not None, f"stuck: {self.waiting}"
                self.pass_time(deadline_s - self.now_s)

    def request(self, model: str) -> str:
        self._loads_before[f"r{self.num_tickets + 1}"] = self.num_admitted
        return super().request(model)

    def _obey(self, action: Action) -> None:
        since_s = self.waiting.get(action.ticket, ("", 0.0))[1] if isinstance(action, StartRequest) else 0.0
        super()._obey(action)
        model, rng = action.model, self._rng
        match action:
            case StartPlan():
                self.at(PLAN_S, lambda: self.end_plan(model))
            case AdmitLoad():
                load_s = rng.uniform(0.1, LONGEST_LOAD_S)
                if rng.random() < self._fail_share:
                    self.at(load_s, lambda: self.fail_load(model, rng.random()))
                else:
                    self.at(load_s * 0.8, lambda: self.get_ready(model))
                    self.at(load_s, lambda: self.land(model))
            case Drop():
                self.at(0.0, lambda: self.end_drop(model))
            case StartRequest(ticket=name):
                self.at(rng.uniform(0.1, self.longest_answer_s), lambda: self.finish(model))
                self._check_wait(self.now_s - since_s, self.num_admitted - self._loads_before[name])
            case _:
                pass

    def _check_wait(self, wait_s: float, num_loads: int) -> None:
        """Patience, then for each load that came meanwhile, and the one under way: the load, what is promised to who
        asked for it, and answers that end.
        """
        bound_s = PLAN_S + PATIENCE_S + (num_loads + 1) * (LONGEST_ANSWER_S + LONGEST_LOAD_S + PROMISE_S)
        assert wait_s <= bound_s, f"waited {wait_s} s, but at most {bound_s} were promised"


def make_traffic(
    seed: int, *, rate_per_s: float, fail_share: float, load_every_s: float | None = None, num_models: int = 5
) -> Traffic:
    """Requests at random; and, where `load_every_s` says how often, a client that loads a model to be sure of it."""
    rng = random.Random(seed)
    machine = Residency(
        100,
        host_bytes=rng.choice([0, 120]),
        keep_alive_s=rng.choice([5.0, -1.0]),
        kept_share=rng.choice([0.0, 0.2]),
        promise_s=PROMISE_S,
        patience_s=PATIENCE_S,
    )
    demands = {
        name: Demand(fixed_bytes=rng.randint(20, 70), min_flexible_bytes=5, max_flexible_bytes=rng.randint(5, 25))
        for name in "abcdefgh"[:num_models]
    }
    traffic = Traffic(machine, demands, rng, fail_share)
    for count in range(1, int(60.0 / load_every_s) if load_every_s else 0):
        traffic.at(count * (load_every_s or 0.0), lambda: traffic.load("a"))
    time_s = 0.0
    while time_s < 60.0:
        time_s += exponential(rng, rate_per_s)
        model = rng.choice(sorted(demands))
        traffic.at(time_s, lambda model=model: _ask(traffic, model, rng))
    return traffic


def _ask(traffic: Traffic, model: str, rng: random.Random) -> None:
    """One request; one of ten gives up after a moment."""
    name = traffic.request(model)
    if rng.random() < 0.1:
        traffic.at(rng.random(), lambda: traffic.give_up(name) if name in traffic.waiting else None)


@pytest.mark.parametrize("fail_share", [0.0, 0.2])
@pytest.mark.parametrize("rate_per_s", [0.5, 5.0])
@pytest.mark.parametrize("load_every_s", [None, 0.3])
def test_nobody_waits_beyond_the_bound(rate_per_s: float, fail_share: float, load_every_s: float | None) -> None:
    for seed in range(20 if load_every_s else 60):
        traffic = make_traffic(seed, rate_per_s=rate_per_s, fail_share=fail_share, load_every_s=load_every_s)
        try:
            traffic.run()
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        traffic.finish_everything()


@pytest.mark.parametrize("seed", range(10))
def test_swaps_are_no_more_than_those_of_models_that_take_turns(seed: int) -> None:
    """Two models with steady work for one place: each turn lasts at least the patience of who waits."""
    rng = random.Random(seed)
    demands = {name: Demand(fixed_bytes=80, min_flexible_bytes=0, max_flexible_bytes=0) for name in "ab"}
    machine = Residency(100, keep_alive_s=-1.0, patience_s=PATIENCE_S)
    traffic = Traffic(machine, demands, rng, 0.0)
    traffic.longest_answer_s = 0.2
    for index in range(1200):
        traffic.at(index * 0.05, lambda index=index: _ask(traffic, "ab"[index % 2], rng))
    traffic.run()
    assert traffic.num_admitted <= 1 + 60.0 / PATIENCE_S
