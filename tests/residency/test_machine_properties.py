"""Any order of events: the machine is driven by a model of its owner that checks every promise after every event."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashtensors.errors import CapacityError, CheckpointError
from flashtensors.residency.actions import Action, AdmitLoad, AnswerLoad, Drop, ReportUnload, StartLoad
from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Demand, State

BUDGET = 100
MODELS = st.sampled_from(["a", "b", "c", "d"])


class ResidencyOwner(RuleBasedStateMachine):
    """Does what it is told, keeps its own books, and fails when they disagree."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Residency(BUDGET, keep_alive_s=20.0, flexible_share=0.5)
        self.now_s = 0.0
        self.num_tickets = 0
        self.held: dict[str, int] = {}
        self.planning: list[str] = []
        self.reading: dict[str, Demand] = {}
        self.demands: dict[str, Demand] = {}
        self.dropping: list[str] = []
        self.ready: set[str] = set()
        self.leases: Counter[str] = Counter()
        self.open_loads: dict[int, str] = {}
        self.open_unloads: dict[int, str] = {}

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartLoad(model=model):
                    assert model not in self.planning + list(self.reading), "one load at a time"
                    assert model not in self.held
                    self.planning.append(model)
                case AdmitLoad(model=model, flexible_bytes=flexible_bytes):
                    demand = self.demands.pop(model)
                    assert demand.min_flexible_bytes <= flexible_bytes <= demand.max_flexible_bytes
                    self.held[model] = demand.fixed_bytes + flexible_bytes
                    self.reading[model] = demand
                case Drop(model=model):
                    assert self.leases[model] == 0, "a model with work in flight is dropped"
                    assert model not in self.planning + list(self.reading) + self.dropping
                    self.dropping.append(model)
                    self.ready.discard(model)
                case AnswerLoad(ticket=ticket, model=model, error=error):
                    assert self.open_loads.pop(ticket) == model, "answered once, by the right model"
                    assert (error is None) == (self.machine.state(model) is State.READY or model in self.ready)
                    if error is not None and model not in self.held:
                        self.demands.pop(model, None)
                case ReportUnload(ticket=ticket, model=model):
                    assert model not in self.held or self.machine.state(model) is not State.READY
                    if ticket is not None:
                        assert self.open_unloads.pop(ticket) == model

    def new_ticket(self) -> int:
        self.num_tickets += 1
        return self.num_tickets

    @rule(model=MODELS, is_pinned=st.sampled_from([False, False, False, True]))
    def load(self, model: str, is_pinned: bool) -> None:
        ticket = self.new_ticket()
        self.open_loads[ticket] = model
        self.take(self.machine.load(ticket, model, self.now_s, is_pinned=is_pinned))

    @rule(model=MODELS)
    def unload(self, model: str) -> None:
        ticket = self.new_ticket()
        self.open_unloads[ticket] = model
        self.take(self.machine.unload(ticket, model, self.now_s))

    @precondition(lambda self: self.planning)
    @rule(data=st.data(), fixed=st.integers(0, 130), low=st.integers(0, 30), more=st.integers(0, 100))
    def plan(self, data: st.DataObject, fixed: int, low: int, more: int) -> None:
        model = self.planning.pop(data.draw(st.integers(0, len(self.planning) - 1)))
        demand = Demand(fixed_bytes=fixed, min_flexible_bytes=low, max_flexible_bytes=low + more)
        self.demands[model] = demand
        self.take(self.machine.planned(model, demand, self.now_s))

    @precondition(lambda self: self.planning)
    @rule(data=st.data())
    def fail_plan(self, data: st.DataObject) -> None:
        model = self.planning.pop(data.draw(st.integers(0, len(self.planning) - 1)))
        self.take(self.machine.load_failed(model, CheckpointError("damaged"), self.now_s))

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), unused=st.integers(0, 5))
    def finish_read(self, data: st.DataObject, unused: int) -> None:
        model = data.draw(st.sampled_from(sorted(self.reading)))
        del self.reading[model]
        self.held[model] = max(0, self.held[model] - unused)
        if self.machine.state(model) is State.LOADING:
            self.ready.add(model)
        self.take(self.machine.loaded(model, self.held[model], self.now_s))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def fail_read(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.reading)))
        del self.reading[model], self.held[model]
        self.take(self.machine.load_failed(model, CheckpointError("damaged"), self.now_s))

    @precondition(lambda self: self.dropping)
    @rule(data=st.data())
    def finish_drop(self, data: st.DataObject) -> None:
        model = self.dropping.pop(data.draw(st.integers(0, len(self.dropping) - 1)))
        self.held.pop(model, None)
        self.demands.pop(model, None)
        self.take(self.machine.unloaded(model, self.now_s))

    @rule(model=MODELS)
    def acquire(self, model: str) -> None:
        is_ready = self.machine.state(model) is State.READY
        assert self.machine.acquire(model, self.now_s) is is_ready
        self.leases[model] += is_ready

    @precondition(lambda self: self.leases.total())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from(sorted(self.leases.elements())))
        self.leases[model] -= 1
        self.take(self.machine.release(model, self.now_s))

    @rule(seconds=st.floats(0.0, 15.0))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.take(self.machine.tick(self.now_s))

    @invariant()
    def memory_stays_within_the_budget(self) -> None:
        assert sum(self.held.values()) <= BUDGET
        assert self.machine.free_bytes == BUDGET - sum(self.held.values())

    @invariant()
    def deadlines_lie_ahead(self) -> None:
        deadline_s = self.machine.next_deadline_s()
        assert deadline_s is None or deadline_s > self.now_s

    @invariant()
    def leases_keep_models(self) -> None:
        for model in +self.leases:
            assert self.machine.state(model) in (State.READY, State.UNLOADING)
            assert model in self.held

    def teardown(self) -> None:
        """When the owner finishes all it was told and requests end, every caller has been answered."""
        for _ in range(200):
            if self.planning:
                model = self.planning.pop()
                self.demands[model] = Demand(fixed_bytes=10, min_flexible_bytes=5, max_flexible_bytes=50)
                self.take(self.machine.planned(model, self.demands[model], self.now_s))
            elif self.reading:
                model, _demand = self.reading.popitem()
                self.take(self.machine.loaded(model, self.held[model], self.now_s))
            elif self.dropping:
                model = self.dropping.pop()
                self.held.pop(model, None)
                self.demands.pop(model, None)
                self.take(self.machine.unloaded(model, self.now_s))
            elif self.leases.total():
                model = next(self.leases.elements())
                self.leases[model] -= 1
                self.take(self.machine.release(model, self.now_s))
            elif self.open_loads and (deadline_s := self.machine.next_deadline_s()) is not None:
                self.now_s = deadline_s
                self.take(self.machine.tick(self.now_s))
            else:
                break
        assert not self.open_loads, "a load is never answered"
        assert not self.open_unloads, "an unload is never answered"


ResidencyOwner.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_any_order_of_events = ResidencyOwner.TestCase


def test_a_refusal_for_lack_of_memory_is_a_capacity_error() -> None:
    machine = Residency(BUDGET, keep_alive_s=-1.0)
    machine.load(1, "a", 0.0)
    (answer,) = machine.planned("a", Demand(fixed_bytes=90, min_flexible_bytes=11, max_flexible_bytes=20), 0.0)
    assert isinstance(answer, AnswerLoad)
    assert isinstance(answer.error, CapacityError)
    assert "90 bytes for weights and at least 11" in answer.error.message
