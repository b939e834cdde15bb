"""One case for each rule of the residency machine."""

import pytest

from flashtensors.errors import BackendUnavailable, CapacityError, CheckpointError, FileChanged, TransferError
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
from flashtensors.residency.tiers import Demand, State, Tier

PROMISE_S = 2.0
PATIENCE_S = 5.0
DAMAGED = CheckpointError("damaged")
CHANGED = FileChanged("replaced")


def make(budget_bytes: int = 100, *, keep_alive_s: float = -1.0, **options: float) -> Residency:
    chosen: dict[str, float] = {"flexible_share": 1.0, "promise_s": PROMISE_S, "patience_s": PATIENCE_S, **options}
    return Residency(budget_bytes, keep_alive_s=keep_alive_s, **chosen)  # type: ignore[arg-type]


def fixed(num_bytes: int) -> Demand:
    return Demand(fixed_bytes=num_bytes, min_flexible_bytes=0, max_flexible_bytes=0)


def admissions(actions: list[Action]) -> list[tuple[str, int]]:
    return [(action.model, action.flexible_bytes) for action in actions if isinstance(action, AdmitLoad)]


def starts(actions: list[Action]) -> list[str]:
    return [action.ticket for action in actions if isinstance(action, StartRequest)]


def answers(actions: list[Action]) -> list[int]:
    return [action.ticket for action in actions if isinstance(action, AnswerLoad)]


def arrive(
    machine: Residency, model: str, now_s: float, *, flexible_bytes: int = 0, host_bytes: int = 0
) -> list[Action]:
    """A load that was admitted gets ready and lands."""
    return machine.ready(model, flexible_bytes, now_s) + machine.landed(model, now_s, host_bytes=host_bytes)


def bring(
    machine: Residency, model: str, num_bytes: int, now_s: float = 0.0, *, is_pinned: bool = False, host_bytes: int = 0
) -> None:
    """Load a model for which there is room."""
    assert machine.load(0, model, now_s, is_pinned=is_pinned) == [StartPlan(model)]
    assert admissions(machine.planned(model, fixed(num_bytes), now_s, image_bytes=num_bytes)) == [(model, 0)]
    assert arrive(machine, model, now_s, host_bytes=host_bytes) == [AnswerLoad(0, model)]


def serve(machine: Residency, model: str, now_s: float) -> None:
    """One request, started and ended."""
    assert starts(machine.request("served", model, now_s)) == ["served"]
    machine.finish(model, now_s)


# One life.


def test_requests_and_loads_of_one_model_share_one_load() -> None:
    machine = make()
    assert machine.request("r", "a", 0.0) == [StartPlan("a")]
    assert machine.load(1, "a", 0.0) == []
    assert machine.state("a") is State.LOADING
    assert machine.planned("a", fixed(60), 0.0) == [AdmitLoad("a", 0)]
    assert machine.request("s", "a", 0.5) == []
    assert machine.ready("a", 0, 1.0) == [StartRequest("r", "a"), StartRequest("s", "a")]
    assert machine.request("t", "a", 1.5) == [StartRequest("t", "a")], "its last layers are still on their way"
    assert machine.load(2, "a", 1.6) == []
    assert machine.landed("a", 2.0) == [AnswerLoad(1, "a"), AnswerLoad(2, "a", was_loaded=True)]
    assert machine.load(3, "a", 3.0) == [AnswerLoad(3, "a", was_loaded=True)]
    assert machine.device.free_bytes == 40


def test_a_plan_is_made_once() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.unload(1, "a", 1.0)
    machine.dropped("a", 1.0)
    assert machine.request("r", "a", 2.0) == [AdmitLoad("a", 0)]


@pytest.mark.parametrize("phase", ["plan", "load"])
def test_a_failure_answers_all_who_wait_and_leaves_the_others(phase: str) -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.load(1, "b", 0.0)
    machine.request("r", "b", 0.0)
    if phase == "load":
        machine.planned("b", fixed(40), 0.0)
    error = DAMAGED if phase == "plan" else TransferError("disk on fire")
    assert machine.failed("b", error, 1.0) == [AnswerLoad(1, "b", error=error), RefuseRequest("r", "b", error)]
    assert (machine.state("a"), machine.state("b")) == (State.READY, State.ABSENT)
    assert machine.device.free_bytes == 40
    assert machine.load(3, "b", 1.0) == [StartPlan("b") if phase == "plan" else AdmitLoad("b", 0)]


@pytest.mark.parametrize("work", ["load", "fill"])
def test_files_that_are_not_what_was_planned_are_planned_again(work: str) -> None:
    machine = make(host_bytes=50)
    machine.prefetch(1, "a", 0.0)
    machine.planned("a", fixed(40), 0.0, image_bytes=40)
    if work == "load":
        machine.filled("a", 0.0, host_bytes=30)
        assert machine.request("r", "a", 1.0) == [AdmitLoad("a", 0, host_bytes=40)]
    assert Forget("a") in machine.failed("a", DAMAGED, 2.0, host_bytes=30)
    assert machine.host.free_bytes == 50
    assert machine.request("s", "a", 3.0) == [StartPlan("a")]


def test_files_that_changed_since_they_were_planned_are_planned_again_once_for_those_who_wait() -> None:
    machine = make(host_bytes=50)
    bring(machine, "a", 60)
    machine.unload(1, "a", 1.0)
    machine.dropped("a", 1.0)
    machine.load(2, "a", 2.0)
    machine.request("r", "a", 2.0)
    assert machine.failed("a", CHANGED, 3.0) == [Forget("a"), StartPlan("a")]
    assert machine.device.free_bytes == 100
    assert machine.planned("a", fixed(80), 4.0) == [AdmitLoad("a", 0)]
    assert machine.ready("a", 0, 5.0) == [StartRequest("r", "a")]
    assert answers(machine.landed("a", 5.0)) == [2]


def test_files_that_change_while_they_are_loaded_are_an_error() -> None:
    machine = make()
    machine.load(1, "a", 0.0)
    for _ in range(2):  # each caller's load tries twice
        machine.planned("a", fixed(60), 1.0)
        assert machine.failed("a", CHANGED, 2.0) == [Forget("a"), StartPlan("a")]
        machine.planned("a", fixed(60), 3.0)
        assert machine.failed("a", CHANGED, 4.0)[0] == AnswerLoad(1, "a", error=CHANGED)
        assert machine.load(1, "a", 5.0) == [StartPlan("a")]


def test_a_prefetch_of_files_that_changed_plans_them_again_once() -> None:
    machine = make(host_bytes=50)
    machine.prefetch(1, "a", 0.0)
    machine.planned("a", fixed(40), 0.0, image_bytes=40)
    assert machine.failed("a", CHANGED, 1.0, host_bytes=30) == [Forget("a"), StartPlan("a")]
    assert machine.planned("a", fixed(40), 2.0, image_bytes=40) == [Fill("a", 40)]
    assert machine.failed("a", CHANGED, 3.0)[0] == AnswerFill(1, "a", 0, CHANGED)


def test_a_load_of_changed_files_that_nobody_wants_any_more_is_over() -> None:
    machine = make()
    machine.load(1, "a", 0.0)
    machine.planned("a", fixed(60), 0.0)
    machine.unload(2, "a", 1.0)
    assert machine.failed("a", CHANGED, 2.0) == [Forget("a"), ReportUnload(2, "a", "unload")]
    assert (machine.state("a"), machine.device.free_bytes) == (State.ABSENT, 100)


def test_a_plan_that_fails_takes_the_image_of_files_that_were_into_account() -> None:
    machine = make(host_bytes=50)
    machine.adopt("a", 40)
    machine.request("r", "a", 0.0)
    machine.failed("a", DAMAGED, 1.0, host_bytes=0)
    assert machine.host.free_bytes == 50


def test_a_load_that_fails_after_it_was_ready_leaves_when_its_requests_have_ended() -> None:
    machine = make()
    machine.request("r", "a", 0.0)
    machine.load(1, "a", 0.0)
    machine.planned("a", fixed(60), 0.0)
    machine.ready("a", 0, 1.0)
    error = TransferError("disk on fire")
    assert machine.failed("a", error, 2.0) == [AnswerLoad(1, "a", error=error)]
    assert machine.state("a") is State.UNLOADING
    assert machine.finish("a", 2.0) == [Drop("a")]
    assert machine.dropped("a", 2.0) == [ReportUnload(None, "a", "failed")]
    assert machine.device.free_bytes == 100


def test_victims_leave_only_for_a_sound_plan() -> None:
    machine = make()
    bring(machine, "a", 60)
    assert machine.request("r", "b", 10.0) == [StartPlan("b")]
    assert machine.failed("b", DAMAGED, 11.0) == [RefuseRequest("r", "b", DAMAGED)]
    assert machine.state("a") is State.READY


def test_a_request_that_gives_up_is_forgotten_and_its_load_too() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.request("busy", "a", 3.0)
    machine.request("r", "b", 3.0)
    machine.planned("b", fixed(60), 3.0)
    assert machine.give_up("r", "b", 4.0) == []
    assert machine.state("b") is State.ABSENT
    assert machine.tick(100.0) == [], "nobody waits for b, so a stays"


# Making room.


def test_the_model_that_is_asked_for_least_makes_room() -> None:
    machine = make()
    for position, model in enumerate("abc"):
        bring(machine, model, 30, float(position))
    serve(machine, "a", 10.0)
    machine.request("r", "d", 20.0)
    assert machine.planned("d", fixed(60), 20.0) == [Drop("b"), Drop("c")]
    assert machine.dropped("b", 20.0) == [ReportUnload(None, "b", "evicted")]
    assert machine.dropped("c", 20.0) == [ReportUnload(None, "c", "evicted"), AdmitLoad("d", 0)]
    assert machine.state("a") is State.READY


def test_a_victim_that_is_not_needed_is_spared() -> None:
    machine = make()
    bring(machine, "small", 10, 0.0)
    bring(machine, "large", 80, 1.0)
    serve(machine, "large", 5.0)
    machine.request("r", "c", 20.0)
    assert machine.planned("c", fixed(60), 20.0) == [Drop("large")], "the small one alone would not do"


def test_idle_models_are_taken_before_busy_ones() -> None:
    machine = make()
    bring(machine, "busy", 50, 0.0)
    bring(machine, "idle", 50, 1.0)
    serve(machine, "idle", 2.0)
    machine.request("r", "busy", 2.0)
    machine.request("s", "c", 10.0)
    assert machine.planned("c", fixed(50), 10.0) == [Drop("idle")]
    assert starts(machine.request("t", "busy", 10.0)) == ["t"]


def test_a_busy_model_serves_on_until_the_patience_of_those_who_wait_ends() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.request("r", "a", 1.0)
    machine.request("s", "b", 5.0)
    assert machine.planned("b", fixed(60), 5.0) == []
    assert machine.next_deadline_s() == 5.0 + PATIENCE_S
    assert machine.request("t", "a", 9.0) == [StartRequest("t", "a")]
    assert machine.tick(5.0 + PATIENCE_S) == []
    assert machine.request("late", "a", 10.5) == [], "it takes no new ones"
    assert machine.finish("a", 11.0) == []
    assert machine.finish("a", 12.0) == [Drop("a")]
    assert machine.dropped("a", 12.0) == [ReportUnload(None, "a", "evicted"), AdmitLoad("b", 0)]
    assert starts(arrive(machine, "b", 13.0)) == ["s"], "and the one that came for a waits in turn"
    assert machine.finish("b", 14.0) == [Drop("b")]


def test_a_busy_model_that_idles_makes_room_at_once() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.request("r", "a", 1.0)
    machine.request("s", "b", 5.0)
    machine.planned("b", fixed(60), 5.0)
    assert machine.finish("a", 5.1) == [Drop("a")]


def test_patience_relates_to_what_the_swap_costs() -> None:
    machine = Residency(10**12, keep_alive_s=-1.0)
    machine.rates.link_bytes_per_s, machine.rates.disk_bytes_per_s = 50e9, 3e9
    for model, patience_s in (("large", 4 * 300e9 / 3e9), ("small", 0.5)):
        machine = Residency(10**12 if model == "large" else 10**8, keep_alive_s=-1.0)
        machine.rates.link_bytes_per_s, machine.rates.disk_bytes_per_s = 50e9, 3e9
        num_bytes = 300 * 10**9 if model == "large" else 10**7
        bring(machine, "holder", machine.device.capacity_bytes)
        machine.request("r", "holder", 10.0)
        machine.request("s", model, 10.0)
        machine.planned(model, fixed(num_bytes), 10.0)
        assert machine.next_deadline_s() == pytest.approx(10.0 + patience_s)


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
    machine.request("r", "a", 1.0)
    assert machine.finish("a", 1.5) == [Drop("a")], "it served, so its promise is kept"


@pytest.mark.parametrize("has_served", [False, True])
def test_who_loads_a_model_again_and_again_does_not_keep_others_waiting(has_served: bool) -> None:
    machine = make(100)
    bring(machine, "a", 60)
    if has_served:
        serve(machine, "a", 0.5)
    machine.load(1, "a", 1.0)
    machine.request("r", "b", 1.0)
    actions = machine.planned("b", fixed(60), 1.0)
    assert (Drop("a") in actions) == has_served, "it is promised until 2 s after the first load, or its first request"
    actions += machine.load(2, "a", 1.5) + machine.tick(PROMISE_S)
    assert Drop("a") in actions


def test_of_two_models_that_are_wanted_as_often_the_one_in_host_memory_makes_room() -> None:
    machine = make(100, host_bytes=40)
    bring(machine, "on disk", 40, 0.0)
    bring(machine, "in host memory", 40, 0.0, host_bytes=40)
    serve(machine, "on disk", 4.0)
    serve(machine, "in host memory", 5.0)
    assert machine.host.held_bytes("on disk") == 0
    machine.request("r", "c", 9.0)
    assert Drop("in host memory") in machine.planned("c", fixed(40), 9.0)


def test_a_model_that_is_wanted_much_less_makes_room_though_it_comes_from_the_disk() -> None:
    machine = make(100, host_bytes=40)
    bring(machine, "on disk", 40, 0.0)
    bring(machine, "in host memory", 40, 0.0, host_bytes=40)
    for _ in range(3):
        serve(machine, "in host memory", 5.0)
    machine.request("r", "c", 9.0)
    assert Drop("on disk") in machine.planned("c", fixed(40), 9.0)


# A load that fails.


def fail_in_the_place_of(machine: Residency, victim: str, *, was_ready: bool) -> list[Action]:
    """Load `new`, for which `victim` must leave, and let its bytes never come."""
    serve(machine, victim, 0.5)
    machine.request("r", "new", 1.0)
    assert Drop(victim) in machine.planned("new", fixed(80), 1.0, image_bytes=80)
    assert admissions(machine.dropped(victim, 1.0)) == [("new", 0)]
    if not was_ready:
        return machine.failed("new", TransferError("disk on fire"), 2.0)
    machine.ready("new", 0, 1.5)
    actions = machine.failed("new", TransferError("disk on fire"), 2.0)
    return actions + machine.finish("new", 2.0) + machine.dropped("new", 2.0)


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_model_that_left_for_a_load_that_failed_comes_back(was_ready: bool) -> None:
    machine = make(100, host_bytes=100)
    bring(machine, "a", 60, host_bytes=60)
    machine.set_keep_alive("a", 20.0, 0.0)
    actions = fail_in_the_place_of(machine, "a", was_ready=was_ready)
    assert AdmitLoad("a", 0, 60, source=Tier.HOST) in actions
    assert arrive(machine, "a", 3.0, host_bytes=60) == []
    assert starts(machine.request("s", "a", 4.0)) == ["s"]
    machine.finish("a", 4.0)
    assert machine.next_deadline_s() == 24.0, "it stays as long as was said"


def test_who_is_wanted_comes_before_a_model_that_left_for_a_load_that_failed() -> None:
    machine = make(100)
    bring(machine, "other", 90)
    machine.unload(1, "other", 0.0)
    machine.dropped("other", 0.0)
    bring(machine, "a", 60)
    serve(machine, "a", 0.5)
    machine.request("r", "new", 1.0)
    assert machine.planned("new", fixed(80), 1.0) == [Drop("a")]
    machine.dropped("a", 1.0)
    machine.request("s", "other", 1.5)
    assert admissions(machine.failed("new", TransferError("disk on fire"), 2.0)) == [("other", 0)]
    assert machine.state("a") is State.ABSENT
    assert machine.next_deadline_s() is None


def test_a_model_does_not_come_back_for_a_load_that_was_cancelled_or_one_that_failed_later() -> None:
    machine = make(100)
    bring(machine, "a", 60)
    serve(machine, "a", 0.5)
    machine.load(1, "new", 1.0)
    assert machine.planned("new", fixed(80), 1.0) == [Drop("a")]
    machine.dropped("a", 1.0)
    machine.unload(2, "new", 1.5)
    assert admissions(machine.failed("new", TransferError("cancelled"), 2.0)) == []
    bring(machine, "b", 60, 3.0)
    assert machine.request("r", "new", 9.0) == [Drop("b")]
    machine.dropped("b", 9.0)
    arrive(machine, "new", 9.0)
    machine.broken("new", TransferError("a step failed"), 10.0)
    machine.finish("new", 10.0)
    assert admissions(machine.dropped("new", 10.0)) == []


def test_a_promise_ends() -> None:
    machine = make()
    bring(machine, "a", 60, 0.0)
    machine.load(1, "b", 0.5)
    machine.planned("b", fixed(60), 0.5)
    assert machine.tick(PROMISE_S) == [Drop("a")]


def test_waiting_loads_are_served_in_order_but_for_memory_that_the_first_will_not_need() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.request("r", "a", 3.0)
    machine.request("s", "b", 5.0)
    machine.request("t", "c", 5.0)
    machine.request("u", "d", 5.0)
    machine.planned("b", fixed(70), 5.0)
    assert admissions(machine.planned("c", fixed(40), 5.0)) == [], "b needs 10 of those 40"
    assert admissions(machine.planned("d", fixed(30), 5.0)) == [("d", 0)], "b does not need these 30"
    assert machine.finish("a", 6.0) == [Drop("a")]
    assert admissions(machine.dropped("a", 6.0)) == [("b", 0)]


# Keep-alive and unload.


def test_an_idle_model_expires_and_a_busy_one_does_not() -> None:
    machine = make(keep_alive_s=10.0)
    bring(machine, "a", 60)
    assert machine.next_deadline_s() == 10.0
    machine.request("r", "a", 9.0)
    assert machine.next_deadline_s() is None
    assert machine.tick(100.0) == []
    machine.finish("a", 100.0)
    assert machine.expires_in_s("a", 104.0) == 6.0
    assert machine.tick(109.0) == []
    assert machine.tick(110.0) == [Drop("a")]
    assert machine.dropped("a", 110.0) == [ReportUnload(None, "a", "keep_alive")]


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
    arrive(machine, "a", 0.0)
    machine.load(2, "a", 5.0)
    assert machine.next_deadline_s() == 55.0
    assert machine.set_keep_alive("a", 0.0, 20.0) == [Drop("a")]


def test_a_request_may_say_how_long_its_model_stays() -> None:
    machine = make(keep_alive_s=10.0)
    machine.request("r", "a", 0.0, keep_alive_s=0.0)
    machine.planned("a", fixed(10), 0.0)
    arrive(machine, "a", 1.0)
    assert machine.finish("a", 2.0) == [Drop("a")]


def test_unload_waits_for_running_requests() -> None:
    machine = make()
    bring(machine, "a", 60)
    machine.request("r", "a", 0.0)
    assert machine.unload(7, "a", 1.0) == []
    assert machine.state("a") is State.UNLOADING
    assert machine.finish("a", 2.0) == [Drop("a")]
    assert machine.unload(8, "a", 2.0) == []
    assert machine.dropped("a", 2.0) == [ReportUnload(7, "a", "unload"), ReportUnload(8, "a", "not_loaded")]
    assert machine.unload(9, "a", 3.0) == [ReportUnload(9, "a", "not_loaded")]


def test_who_comes_during_an_unload_waits_for_the_next_life() -> None:
    machine = make()
    bring(machine, "a", 60)
    assert machine.unload(1, "a", 1.0) == [Drop("a")]
    assert machine.load(2, "a", 1.0) == []
    assert machine.request("r", "a", 1.0) == []
    assert machine.dropped("a", 2.0) == [ReportUnload(1, "a", "unload"), AdmitLoad("a", 0)]
    actions = arrive(machine, "a", 3.0)
    assert (answers(actions), starts(actions)) == ([2], ["r"])


@pytest.mark.parametrize("phase", ["planning", "waiting", "reading", "landing"])
def test_unload_during_a_load_refuses_it(phase: str) -> None:
    machine = make()
    bring(machine, "big", 80)
    machine.request("r", "big", 3.0)
    machine.load(1, "a", 5.0)
    num_bytes = 50 if phase == "waiting" else 20
    if phase != "planning":
        machine.planned("a", fixed(num_bytes), 5.0)
    if phase == "landing":
        machine.ready("a", 0, 5.5)
    actions = machine.unload(2, "a", 6.0)
    assert answers(actions) == [1]
    if phase == "reading":
        actions += machine.failed("a", TransferError("cancelled"), 7.0)
    elif phase == "landing":
        assert machine.landed("a", 7.0) == [Drop("a")]
        actions += machine.dropped("a", 7.0)
    assert actions[-1] == ReportUnload(2, "a", "unload")
    assert machine.device.free_bytes == 20
    assert starts(machine.request("s", "big", 9.0)) == ["s"]


# Memory of KV caches.


def test_flexible_memory_is_a_share_of_what_is_free_and_returned_when_unused() -> None:
    machine = make(1000, flexible_share=0.5)
    demand = Demand(fixed_bytes=200, min_flexible_bytes=100, max_flexible_bytes=10_000, step_bytes=20)
    machine.load(1, "a", 0.0)
    assert admissions(machine.planned("a", demand, 0.0)) == [("a", 400)]
    machine.ready("a", 300, 0.0)
    assert machine.device.free_bytes == 500
    machine.landed("a", 0.0)
    machine.load(1, "b", 0.0)
    assert admissions(machine.planned("b", demand, 0.0)) == [("b", 140)], "half of 300, in steps of 20"


def test_models_that_are_wanted_together_take_a_fair_part_each() -> None:
    machine = make(1000, flexible_share=0.5)
    demand = Demand(fixed_bytes=100, min_flexible_bytes=50, max_flexible_bytes=10_000)
    for model in "abcd":
        machine.request(model, model, 0.0)
    assert admissions(machine.planned("a", demand, 0.0)) == [("a", 150)], "a quarter of the device with its weights"


def test_the_kv_cache_of_an_evicted_model_is_kept_and_used_again() -> None:
    machine = make(kept_share=0.3)
    demand = Demand(fixed_bytes=40, min_flexible_bytes=20, max_flexible_bytes=20)
    for model in "ab":
        machine.request(model, model, 0.0)
        machine.planned(model, demand if model == "a" else fixed(70), 0.0)
    machine.ready("a", 20, 1.0)
    machine.landed("a", 1.0)
    assert machine.finish("a", 2.0) == [Drop("a", keeps_kv=True)], "80 bytes are enough for b"
    assert admissions(machine.dropped("a", 2.0, kept_bytes=20)) == [("b", 0)]
    assert machine.device.free_bytes == 10
    arrive(machine, "b", 3.0)
    machine.request("again", "a", 4.0)
    assert machine.finish("b", 5.0) == [Drop("b")]
    assert machine.dropped("b", 5.0) == [
        ReportUnload(None, "b", "evicted"),
        AdmitLoad("a", 20, uses_kept_kv=True),
    ]
    assert machine.device.free_bytes == 40


def test_kept_kv_caches_are_the_first_to_go() -> None:
    machine = make(kept_share=0.3)
    demand = Demand(fixed_bytes=30, min_flexible_bytes=20, max_flexible_bytes=20)
    for model in "ab":
        machine.request(model, model, 5.0)
        machine.planned(model, demand if model == "a" else fixed(60), 5.0)
    machine.ready("a", 20, 6.0)
    machine.landed("a", 6.0)
    assert machine.finish("a", 7.0) == [Drop("a", keeps_kv=True)]
    machine.dropped("a", 7.0, kept_bytes=20)
    arrive(machine, "b", 7.0)
    machine.finish("b", 7.0)
    machine.request("c", "c", 8.0)
    assert machine.planned("c", fixed(30), 8.0) == [DropKept("a"), AdmitLoad("c", 0)]
    assert machine.state("b") is State.READY


def test_a_model_that_does_not_fit_beside_its_own_kept_cache_drops_it() -> None:
    machine = make(kept_share=0.5)
    demand = Demand(fixed_bytes=50, min_flexible_bytes=0, max_flexible_bytes=50)
    machine.request("r", "a", 0.0)
    machine.planned("a", demand, 0.0)
    machine.ready("a", 50, 0.0)
    machine.landed("a", 0.0)
    machine.request("s", "p", 0.0)
    machine.planned("p", fixed(20), 0.0)
    assert machine.finish("a", 1.0) == [Drop("a", keeps_kv=True)]
    machine.dropped("a", 1.0, kept_bytes=50)
    arrive(machine, "p", 1.0)
    machine.load(9, "p", 1.0, is_pinned=True)
    assert machine.request("t", "a", 2.0) == [DropKept("a"), AdmitLoad("a", 0)], "the fair part of two"


# Host memory.


def test_an_image_is_kept_and_the_next_load_comes_from_host_memory() -> None:
    machine = make(host_bytes=100)
    machine.request("r", "a", 0.0)
    assert machine.planned("a", fixed(60), 0.0, image_bytes=60) == [AdmitLoad("a", 0, host_bytes=60)]
    assert machine.tier("a") is Tier.DISK
    arrive(machine, "a", 0.0, host_bytes=60)
    assert machine.tier("a") is Tier.DEVICE
    machine.finish("a", 1.0)
    machine.unload(1, "a", 1.0)
    machine.dropped("a", 1.0)
    assert machine.tier("a") is Tier.HOST
    assert machine.request("s", "a", 2.0) == [AdmitLoad("a", 0, host_bytes=60, source=Tier.HOST)]


def test_tails_go_before_heads_and_those_wanted_least_first() -> None:
    machine = make(1000, host_bytes=160)
    for model, num_requests in (("rare", 1), ("often", 2)):
        bring(machine, model, 80, host_bytes=80)
        for _ in range(num_requests):
            serve(machine, model, 0.0)
    for _ in range(4):
        machine.request("r", "new", 1.0)
    actions = machine.planned("new", fixed(80), 1.0, image_bytes=80)
    assert actions == [TrimHost("rare", 10), TrimHost("often", 70), AdmitLoad("new", 0, host_bytes=80)]


def test_a_model_that_is_wanted_less_than_all_others_passes_through() -> None:
    machine = make(1000, host_bytes=100)
    bring(machine, "often", 80, host_bytes=80)
    serve(machine, "often", 0.0)
    machine.request("r", "new", 1.0)
    machine.request("s", "often", 1.0)
    assert machine.planned("new", fixed(80), 1.0, image_bytes=80) == [AdmitLoad("new", 0, host_bytes=20)]


def test_the_image_of_a_pinned_model_gives_way_to_any() -> None:
    machine = make(1000, host_bytes=100)
    bring(machine, "pinned", 80, host_bytes=80, is_pinned=True)
    for _ in range(5):
        serve(machine, "pinned", 0.0)
    machine.request("r", "new", 1.0)
    actions = machine.planned("new", fixed(80), 1.0, image_bytes=80)
    assert actions == [TrimHost("pinned", 20), AdmitLoad("new", 0, host_bytes=80)]


def test_prefetch_fills_host_memory_and_is_answered() -> None:
    machine = make(host_bytes=100)
    assert machine.prefetch(1, "a", 0.0) == [StartPlan("a")]
    assert machine.planned("a", fixed(60), 0.0, image_bytes=60) == [Fill("a", 60)]
    assert machine.prefetch(2, "a", 0.5) == []
    assert machine.filled("a", 1.0, host_bytes=60) == [AnswerFill(1, "a", 60), AnswerFill(2, "a", 60)]
    assert (machine.tier("a"), machine.state("a")) == (Tier.HOST, State.ABSENT)
    assert machine.prefetch(3, "a", 2.0) == [AnswerFill(3, "a", 60)]


def test_a_request_ends_a_fill_and_its_load_answers_the_prefetch() -> None:
    machine = make(host_bytes=100)
    machine.prefetch(1, "a", 0.0)
    machine.planned("a", fixed(60), 0.0, image_bytes=60)
    assert machine.request("r", "a", 0.5) == [StopFill("a")]
    assert machine.filled("a", 0.6, host_bytes=20) == [AdmitLoad("a", 0, host_bytes=60)]
    assert arrive(machine, "a", 1.0, host_bytes=60) == [StartRequest("r", "a"), AnswerFill(1, "a", 60)]


def test_a_prefetch_without_a_host_tier_is_refused() -> None:
    machine = make()
    machine.prefetch(1, "a", 0.0)
    (answer,) = machine.planned("a", fixed(60), 0.0)
    assert isinstance(answer, AnswerFill)
    assert isinstance(answer.error, BackendUnavailable)


def test_a_fill_that_fails_keeps_what_it_read() -> None:
    machine = make(host_bytes=100)
    machine.prefetch(1, "a", 0.0)
    machine.planned("a", fixed(60), 0.0, image_bytes=60)
    error = TransferError("disk on fire")
    assert machine.failed("a", error, 1.0, host_bytes=30) == [AnswerFill(1, "a", error=error)]
    assert machine.host.held_bytes("a") == 30


def test_what_an_earlier_worker_left_is_taken_over() -> None:
    machine = make(host_bytes=100)
    machine.adopt("a", 60)
    assert machine.request("r", "a", 0.0) == [StartPlan("a")]
    assert machine.planned("a", fixed(60), 0.0, image_bytes=60) == [AdmitLoad("a", 0, host_bytes=60, source=Tier.HOST)]


def test_a_forgotten_model_is_planned_and_read_again() -> None:
    machine = make(host_bytes=100, kept_share=0.3)
    bring(machine, "a", 60, host_bytes=60)
    assert machine.forget("a", 1.0) == [Forget("a")]
    assert starts(machine.request("r", "a", 1.0)) == ["r"], "what is loaded serves on"
    assert machine.host.held_bytes("a") == 0
    machine.finish("a", 2.0)
    machine.unload(1, "a", 3.0)
    machine.dropped("a", 3.0)
    assert machine.request("s", "a", 4.0) == [StartPlan("a")]


def test_a_model_is_not_forgotten_while_its_bytes_move() -> None:
    machine = make(host_bytes=100)
    machine.request("r", "a", 0.0)
    machine.planned("a", fixed(60), 0.0, image_bytes=60)
    assert machine.forget("a", 0.5) == []
    machine.ready("a", 0, 1.0)
    assert machine.landed("a", 1.0, host_bytes=60) == [Forget("a")]
    assert machine.host.held_bytes("a") == 0


def test_a_kept_cache_of_files_that_have_changed_meanwhile_is_dropped() -> None:
    machine = make(kept_share=0.5)
    machine.request("r", "a", 0.0)
    machine.planned("a", Demand(fixed_bytes=50, min_flexible_bytes=20, max_flexible_bytes=20), 0.0)
    arrive(machine, "a", 0.0, flexible_bytes=20)
    machine.finish("a", 0.0)
    machine.request("s", "b", 1.0)
    assert machine.planned("b", fixed(60), 1.0) == [Drop("a", keeps_kv=True)]
    assert machine.forget("a", 2.0) == [Forget("a")]
    actions = machine.dropped("a", 3.0, kept_bytes=20)
    assert DropKept("a") in actions
    assert machine.device.total_kept_bytes == 0


def test_what_an_earlier_owner_left_is_not_cut_while_its_model_is_planned() -> None:
    machine = make(host_bytes=60)
    machine.adopt("a", 60)
    machine.request("r", "a", 0.0)
    machine.request("s", "b", 0.0)
    actions = machine.planned("b", fixed(50), 0.0, image_bytes=50)
    assert [action.host_bytes for action in actions if isinstance(action, AdmitLoad)] == [0]
    machine.prefetch(1, "c", 0.0)
    assert TrimHost not in map(type, machine.planned("c", fixed(50), 0.0, image_bytes=50))


def test_prefetches_are_read_one_after_the_other() -> None:
    machine = make(host_bytes=100)
    for ticket, model in enumerate("abc"):
        machine.prefetch(ticket, model, 0.0)
    assert machine.planned("b", fixed(10), 0.0, image_bytes=10) == [Fill("b", 10)]
    assert machine.planned("a", fixed(10), 0.0, image_bytes=10) == []
    assert machine.planned("c", fixed(10), 0.0, image_bytes=10) == []
    assert machine.filled("b", 1.0, host_bytes=10) == [AnswerFill(1, "b", 10), Fill("a", 10)]
    error = TransferError("disk on fire")
    assert machine.failed("a", error, 2.0) == [AnswerFill(0, "a", error=error), Fill("c", 10)]


def test_a_model_that_breaks_leaves_and_who_waits_for_the_next_life_is_not_refused() -> None:
    machine = make()
    bring(machine, "a", 50)
    machine.request("r", "a", 1.0)
    error = TransferError("a step failed")
    assert machine.broken("a", error, 1.0) == []
    machine.request("s", "a", 1.0)
    assert machine.broken("a", error, 1.0) == []
    assert machine.finish("a", 1.0) == [Drop("a")]
    assert admissions(machine.dropped("a", 2.0)) == [("a", 0)]


def test_a_model_that_no_pinned_one_leaves_room_for_is_refused() -> None:
    machine = make()
    bring(machine, "a", 60, is_pinned=True)
    bring(machine, "b", 30, is_pinned=True)
    machine.request("r", "c", 1.0)
    (action,) = [each for each in machine.planned("c", fixed(20), 1.0) if isinstance(each, RefuseRequest)]
    assert isinstance(action.error, CapacityError)
    assert "pinned models hold 90" in action.error.message
    machine.prefetch(1, "c", 2.0)
    assert machine.next_deadline_s() is None
