"""The bound that benchmarks of the residency hold waits against: it is kept, near, and exceeded by who breaks it."""

from __future__ import annotations

import pytest

from benchmarks.residency.simulated_owner import Machine, Outcome, SimulatedOwner
from benchmarks.residency.waiting_bound import Load, bound_measured, compare, find_patience_s
from benchmarks.residency.zipf_trace import Arrival, make_trace
from flashtensors.residency.machine import Residency
from flashtensors.residency.rates import Rates

ONE_PLACE = Machine(device_bytes=10**9, disk_bytes_per_s=1e9)
TURNS = [Arrival(index * 0.01, index % 2) for index in range(3000)]
"""Requests for two models, each every 20 ms."""


def run(trace: list[Arrival], machine: Machine, kept_s: float | None, promised_s: float | None) -> Outcome:
    residency = Residency(machine.device_bytes, keep_alive_s=300.0, host_bytes=machine.host_bytes, patience_s=kept_s)
    return SimulatedOwner(machine, residency, patience_s=promised_s).run(trace)


@pytest.mark.parametrize("patience_s", [None, 0.5, 3.0])
def test_models_that_take_turns_wait_nearly_as_long_as_is_promised(patience_s: float | None) -> None:
    outcome = run(TURNS, ONE_PLACE, patience_s, patience_s)
    found = compare([wait_s for wait_s, _ in outcome.waits], outcome.bounds_s)
    assert (found["num_beyond_bound"], found["num"]) == (0, len(TURNS))
    assert found["largest_share_of_bound"] > 0.5


def test_eight_models_that_take_turns_wait_for_each_other_s_answers() -> None:
    trace = [Arrival(index * 0.05, index % 8) for index in range(600)]
    slow = Machine(device_bytes=10**9, disk_bytes_per_s=50e9, answer_s=0.5)
    outcome = run(trace, slow, None, None)
    found = compare([wait_s for wait_s, _ in outcome.waits], outcome.bounds_s)
    assert found["num_beyond_bound"] == 0
    assert found["longest_wait_s"] > 6 * slow.answer_s, "one after the other"
    assert found["largest_share_of_bound"] > 0.5


@pytest.mark.parametrize("hold_s", [0.0, 1.0])
@pytest.mark.parametrize("requests_per_s", [2.0, 20.0])
def test_nobody_waits_beyond_the_bound(requests_per_s: float, hold_s: float) -> None:
    trace = make_trace(num_models=100, exponent=1.1, requests_per_s=requests_per_s, duration_s=100.0)
    outcome = run(trace, Machine(hold_s=hold_s), None, None)
    assert all(wait_s <= bound_s for (wait_s, _), bound_s in zip(outcome.waits, outcome.bounds_s, strict=True))


def test_a_machine_with_more_patience_than_it_promised_is_found_out() -> None:
    outcome = run(TURNS, ONE_PLACE, 5.0, 0.5)
    assert compare([wait_s for wait_s, _ in outcome.waits], outcome.bounds_s)["num_beyond_bound"] > 0


def test_patience_is_four_swaps_from_disk_and_at_least_half_a_second() -> None:
    rates = Rates(link_bytes_per_s=50e9, disk_bytes_per_s=2e9)
    assert find_patience_s(rates, 10**9) == pytest.approx(2.0)
    assert find_patience_s(rates, 10**6) == 0.5
    assert find_patience_s(rates, 10**9, 0.1) == 0.1


def test_a_measured_bound_has_the_patience_and_the_loads_of_the_time_of_the_wait() -> None:
    bound_s = bound_measured(
        10.0,
        12.0,
        patiences=[(0.0, 9.0), (5.0, 0.5), (11.0, 0.75), (13.0, 9.0)],
        loads=[Load(1.0, 2.0), Load(9.0, 10.25), Load(11.0, 11.5), Load(12.5, 13.0)],
        answer_s=0.125,
        own_s=0.0625,
    )
    assert bound_s == 0.0625 + 0.75 + 0.125 + (1.25 + 0.125) + (0.5 + 0.125)


def test_the_longest_wait_and_the_one_nearest_to_its_bound_may_be_two() -> None:
    assert compare([2.0, 1.0, 3.0], [4.0, 0.8, 6.0]) == {
        "longest_wait_s": 3.0,
        "its_bound_s": 6.0,
        "largest_share_of_bound": 1.25,
        "num_beyond_bound": 1,
        "num": 3,
    }
