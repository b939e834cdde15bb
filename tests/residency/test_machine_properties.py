"""Any order of events, over thousands of seeds: a model of the owner checks every promise after each event."""

import random
from collections.abc import Callable

import pytest

from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Demand, State

from .fake_owner import BUDGET, HOST, FakeOwner, random_demand

NUM_SEEDS = 2000
SEEDS_PER_TEST = 250


def play(seed: int) -> None:
    """Sixty random events, then everything ends well."""
    rng = random.Random(seed)
    names = "abcdef"[: rng.randint(2, 6)]
    machine = Residency(
        BUDGET,
        host_bytes=rng.choice([0, HOST, 40]),
        keep_alive_s=rng.choice([20.0, 0.0, -1.0]),
        flexible_share=rng.choice([0.5, 1.0]),
        kept_share=rng.choice([0.0, 0.3]),
        patience_s=rng.choice([None, 0.0, 5.0]),
    )
    owner = FakeOwner(machine, {name: random_demand(rng) for name in names})
    for _ in range(60):
        rng.choice(_possible(owner, rng, names))()
    owner.finish_everything()


def _possible(owner: FakeOwner, rng: random.Random, names: str) -> list[Callable[[], None]]:
    """Events that can happen now, some of them likelier than others."""
    model = rng.choice(names)
    events: list[Callable[[], None]] = [
        *[lambda: (owner.request(model), None)[1]] * 4,
        lambda: owner.load(model, is_pinned=rng.random() < 0.1),
        lambda: owner.prefetch(model),
        lambda: owner.unload(model),
        lambda: owner.take(owner.machine.forget(model, owner.now_s)),
        lambda: owner.take(owner.machine.set_keep_alive(model, rng.choice([0.0, 30.0, -1.0]), owner.now_s)),
        *[lambda: owner.pass_time(rng.choice([0.1, 1.0, 10.0]))] * 2,
    ]
    if owner.waiting:
        events.append(lambda: owner.give_up(rng.choice(sorted(owner.waiting))))
    if owner.leases.total():
        events += [lambda: owner.finish(rng.choice(sorted(owner.leases.elements())))] * 4
        events.append(lambda: owner.break_down(rng.choice(sorted(owner.leases.elements()))))
    if owner.planning:
        events += [lambda: owner.end_plan(rng.choice(owner.planning), fails=rng.random() < 0.1)] * 4
    if owner.fills:
        fill = rng.choice(sorted(owner.fills))
        events += [
            lambda: owner.end_fill(
                fill, rng.choice([0.3, 1.0]), fails=rng.random() < 0.2, has_changed=rng.random() < 0.5
            )
        ] * 2
    if owner.dropping:
        events += [lambda: owner.end_drop(rng.choice(sorted(owner.dropping)))] * 4
    moving = sorted(name for name, life in owner.lives.items() if not life.has_landed)
    if moving:
        loading = rng.choice(moving)
        step = owner.land if owner.lives[loading].is_ready else owner.get_ready
        events += [lambda: step(loading)] * 4
        events.append(lambda: owner.fail_load(loading, rng.random(), has_changed=rng.random() < 0.5))
    return events


def play_failure(seed: int) -> None:
    """Models that fit serve; one that needs their memory is asked for, and never comes."""
    rng = random.Random(seed)
    demands = {
        name: Demand(fixed_bytes=rng.randint(10, 40), min_flexible_bytes=0, max_flexible_bytes=0)
        for name in "abcdef"[: rng.randint(1, 6)]
    }
    demands["new"] = Demand(fixed_bytes=rng.randint(60, BUDGET), min_flexible_bytes=0, max_flexible_bytes=0)
    owner = FakeOwner(
        Residency(BUDGET, host_bytes=rng.choice([0, HOST, 40]), keep_alive_s=-1.0, kept_share=rng.choice([0.0, 0.3])),
        demands,
    )
    for name in demands:
        if name != "new":
            owner.request(name)
            owner.finish_everything()
    before = set(owner.machine.models_in(State.READY))
    owner.request("new")
    while "new" not in owner.lives:
        owner.advance()
    has_changed = rng.random() < 0.3
    if rng.random() < 0.5:
        owner.get_ready("new")
    owner.fail_load("new", rng.random(), has_changed=has_changed)
    if "new" in owner.planning:  # once more, for files that had changed
        owner.end_plan("new")
        owner.fail_load("new", rng.random())
    while owner.advance():
        pass
    assert set(owner.machine.models_in(State.READY)) == before


def test_a_load_that_fails_leaves_those_that_served_before() -> None:
    for seed in range(NUM_SEEDS):
        try:
            play_failure(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_any_order_of_events(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            play(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
