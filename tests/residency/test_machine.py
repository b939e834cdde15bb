"""One case for each rule of the residency machine."""

import pytest

from flashtensors.errors import CapacityError, CheckpointError
from flashtensors.residency.actions import Action, AdmitLoad, AnswerLoad, Drop, ReportUnload, StartLoad
from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Demand, State

PROMISE_S = 2.0


def make(budget_bytes: int = 100, *, keep_alive_s: float = -1.0, flexible_share: float = 1.0) -> Residency:
    return Residency(budget_bytes, keep_alive_s=keep_alive_s, flexible_share=flexible_share, promise_s=PROMISE_S)


def fixed(num_bytes: int) -> Demand:
    return Demand(fixed_bytes=num_bytes, min_flexible_bytes=0, max_flexible_bytes=0)


def bring(machine: Residency, model: str, num_bytes: int, now_s: float = 0.0, *, is_pinned: bool = False) -> None:
    """Load a model for which there is room."""
    assert machine.load(0, model, now_s, is_pinned=is_pinned) == [StartLoad(model)]
    assert machine.planned(model, fixed(num_bytes), now_s) == [AdmitLoad(model, 0)]
    assert machine.loaded(model, num_bytes, now_s) == [AnswerLoad(0, model)]


def answers(actions: list[Action]) -> list[int]:
    return [action.ticket for action in actions if isinstance(action, AnswerLoad)]


def test_loads_of_one_model_share_one_load() -> None:
    machine = make()
    assert machine.load(1, "a", 0.0) == [StartLoad("a")]
    assert machine.load(2, "a", 0.0) == []
    assert machine.state("a") is State.LOADING
    assert machine.planned("a", fixed(60), 0.0) == [AdmitLoad("a", 0)]
    assert machine.load(3, "a", 0.0) == []
    assert machine.loaded("a", 60, 1.0) == [
        AnswerLoad(1, "a"),
        AnswerLoad(2, "a", was_loaded=True),
        AnswerLoad(3, "a", was_loaded=True),
    ]
    assert machine.load(4, "a", 2.0) == [AnswerLoad(4, "a", was_loaded=True)]
    assert machine.free_bytes == 40


def test_a_failed_load_is_answered_and_leaves_the_others() -> None:
    machine = make()
    bring(machine, "a", 60)
    error = CheckpointError("damaged")
    machine.load(1, "b", 0.0)
    machine.load(2, "b", 0.0)
    assert machine.load_failed("b", error, 1.0) == [AnswerLoad(1, "b", error=error), AnswerLoad(2, "b", error=error)]
    assert (machine.state("a"), machine.state("b")) == (State.READY, State.ABSENT)
    assert machine.load(3, "b", 1.0) == [StartLoad("b")]
    machine.planned("b", fixed(40), 1.0)
    assert machine.load_failed("b", error, 1.0) == [AnswerLoad(3, "b", error=error)]
    assert machine.free_bytes == 40


def test_the_least_recently_used_idle_model_makes_room() -> None:
    machine = make()
    for position, model in enumerate("abc"):
        bring(machine, model, 30, float(position))
    assert machine.acquire("a", 10.0)
    machine.release("a", 11.0)
    machine.load(1, "d", 20.0)
    assert machine.planned("d", fixed(60), 20.0) == [Drop("b"), Drop("c")]
    assert machine.unloaded("b", 20.0) == [ReportUnload(None, "b", "evicted")]
    assert machine.unloaded("c", 20.0) == [ReportUnload(None, "c", "evicted"), AdmitLoad("d", 0)]
    assert machine.state("a") is State.READY


def test_a_busy_model_leaves_only_after_its_requests() -> None:
    machine = make()
    bring(machine, "a", 60)
    assert machine.acquire("a", 1.0)
    assert machine.acquire("a", 1.0)
    machine.load(1, "b", 5.0)
    assert machine.planned("b", fixed(60), 5.0) == []
    assert not machine.acquire("a", 5.0)
    assert machine.release("a", 6.0) == []
    assert machine.release("a", 7.0) == [Drop("a")]
    assert machine.unloaded("a", 7.0) == [ReportUnload(None, "a", "evicted"), AdmitLoad("b", 0)]


def test_idle_models_are_taken_before_busy_ones() -> None:
    machine = make()
    bring(machine, "busy", 50, 0.0)
    bring(machine, "idle", 50, 1.0)
    machine.acquire("busy", 2.0)
    machine.load(1, "c", 10.0)
    assert machine.planned("c", fixed(50), 10.0) == [Drop("idle")]
    assert machine.acquire("busy", 10.0)


def test_pinned_models_stay_and_a_model_that_can_never_fit_is_refused() -> None:
    machine = make()
    bring(machine, "a", 60, is_pinned=True)
    machine.load(1, "b", 10.0)
    (refusal,) = machine.planned("b", fixed(50), 10.0)
    assert isinstance(refusal, AnswerLoad)
    assert isinstance(refusal.error, CapacityError)
    assert "pinned models hold 60" in refusal.error.message
    assert (machine.state("a"), machine.state("b")) == (State.READY, State.ABSENT)


def test_a_promised_model_is_not_evicted_before_it_served() -> None:
    machine = make()
    bring(machine, "a", 60, 0.0)
    machine.load(1, "b", 0.5)
    assert machine.planned("b", fixed(60), 0.5) == []
    assert machine.next_deadline_s() == PROMISE_S
    assert machine.acquire("a", 1.0)
    assert machine.release("a", 1.5) == [Drop("a")], "it served, so its promise is kept"


def test_a_promise_ends() -> None:
    machine = make()
    bring(machine, "a", 60, 0.0)
    machine.load(1, "b", 0.5)
    machine.planned("b", fixed(60), 0.5)
    assert machine.tick(PROMISE_S) == [Drop("a")]
    assert machine.next_deadline_s() is None


def test_an_idle_model_expires_and_a_busy_one_does_not() -> None:
    machine = make(keep_alive_s=10.0)
    bring(machine, "a", 60)
    assert machine.next_deadline_s() == 10.0
    machine.acquire("a", 9.0)
    assert machine.next_deadline_s() is None
    assert machine.tick(100.0) == []
    machine.release("a", 100.0)
    assert machine.expires_in_s("a", 104.0) == 6.0
    assert machine.tick(109.0) == []
    assert machine.tick(110.0) == [Drop("a")]
    assert machine.unloaded("a", 110.0) == [ReportUnload(None, "a", "keep_alive")]


@pytest.mark.parametrize("is_pinned", [True, False])
def test_pinned_models_and_negative_keep_alive_never_expire(is_pinned: bool) -> None:
    machine = make(keep_alive_s=10.0 if is_pinned else -1.0)
    bring(machine, "a", 60, is_pinned=is_pinned)
    assert machine.next_deadline_s() is None
    assert machine.tick(1e9) == []


def test_keep_alive_is_kept_by_loads_that_do_not_set_it() -> None:
    machine = make(keep_alive_s=10.0)
    machine.load(1, "a", 0.0, keep_alive_s=50.0)
    machine.planned("a", fixed(10), 0.0)
    machine.loaded("a", 10, 0.0)
    machine.load(2, "a", 5.0)
    assert machine.next_deadline_s() == 55.0
    assert machine.set_keep_alive("a", 0.0, 20.0) == [Drop("a")]


def test_unload_waits_for_running_requests() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.acquire("a", 0.0)
    assert machine.unload(7, "a", 1.0) == []
    assert machine.state("a") is State.UNLOADING
    assert machine.release("a", 2.0) == [Drop("a")]
    assert machine.unload(8, "a", 2.0) == []
    assert machine.unloaded("a", 2.0) == [ReportUnload(7, "a", "unload"), ReportUnload(8, "a", "not_loaded")]
    assert machine.unload(9, "a", 3.0) == [ReportUnload(9, "a", "not_loaded")]


def test_a_load_during_unload_begins_when_the_model_is_gone() -> None:
    machine = make()
    bring(machine, "a", 60)
    assert machine.unload(1, "a", 1.0) == [Drop("a")]
    assert machine.load(2, "a", 1.0) == []
    assert machine.unloaded("a", 2.0) == [ReportUnload(1, "a", "unload"), StartLoad("a")]
    machine.planned("a", fixed(60), 2.0)
    assert answers(machine.loaded("a", 60, 3.0)) == [2]


@pytest.mark.parametrize("phase", ["planning", "waiting", "reading"])
def test_unload_during_a_load_refuses_it(phase: str) -> None:
    machine = make()
    bring(machine, "big", 80)
    machine.acquire("big", 0.0)
    machine.load(1, "a", 5.0)
    num_bytes = 50 if phase == "waiting" else 20
    if phase != "planning":
        machine.planned("a", fixed(num_bytes), 5.0)
    actions = machine.unload(2, "a", 6.0)
    assert answers(actions) == [1]
    if phase == "planning":
        actions += machine.planned("a", fixed(num_bytes), 7.0)
    elif phase == "reading":
        actions += machine.loaded("a", num_bytes, 7.0)
    assert Drop("a") in actions
    assert machine.unloaded("a", 8.0) == [ReportUnload(2, "a", "unload")]
    assert machine.free_bytes == 20
    assert machine.acquire("big", 9.0) is (phase != "waiting")


def test_waiting_loads_are_served_in_order() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.acquire("a", 0.0)
    machine.load(1, "b", 5.0)
    machine.load(2, "c", 5.0)
    machine.planned("b", fixed(70), 5.0)
    assert machine.planned("c", fixed(30), 5.0) == [], "c fits, but may not pass b"
    assert machine.release("a", 6.0) == [Drop("a")]
    assert machine.unloaded("a", 6.0) == [
        ReportUnload(None, "a", "evicted"),
        AdmitLoad("b", 0),
        AdmitLoad("c", 0),
    ]


def test_flexible_memory_is_a_share_of_what_is_free_and_returned_when_unused() -> None:
    machine = make(100, flexible_share=0.5)
    demand = Demand(fixed_bytes=20, min_flexible_bytes=10, max_flexible_bytes=1000)
    for model, share in (("a", 40), ("b", 10)):
        machine.load(1, model, 0.0)
        assert machine.planned(model, demand, 0.0) == [AdmitLoad(model, share)]
        machine.loaded(model, 20 + share, 0.0)
    assert machine.free_bytes == 10
    machine.unload(2, "a", 5.0)
    machine.unloaded("a", 5.0)
    machine.load(3, "a", 5.0)
    machine.planned("a", demand, 5.0)
    machine.loaded("a", 25, 5.0)
    assert machine.free_bytes == 45
