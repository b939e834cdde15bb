"""A load that fails is told of once, however many wait for it and however it ends; one that was unloaded is not."""

import threading

import pytest

from flashtensors.errors import FileChanged, TransferError
from flashtensors.worker.messages import (
    Abort,
    Generate,
    LoadFailed,
    ModelLanded,
    ModelLoadFailed,
    ModelUnloaded,
    Prefetch,
    Prefetched,
    RequestFailed,
    UnloadModel,
)

from .fake_models import Bench, FakeImages, load_command, register, request

ERROR = TransferError("disk on fire")


@pytest.fixture
def bench() -> Bench:
    return make_bench()


def make_bench(kv_bytes: int = 0) -> Bench:
    bench = Bench(images=FakeImages(150), kv_bytes=kv_bytes)
    bench.send(register("a"), register("b"))
    return bench


def ask(bench: Bench, *names: str, max_tokens: int = 5) -> None:
    """Send requests whose first letter names their model."""
    bench.send(*(Generate(request=request(name, name[0], max_tokens=max_tokens)) for name in names))


def failures(bench: Bench) -> list[tuple[str, str]]:
    return [(event.model, event.error.code) for event in bench.of(ModelLoadFailed)]


def start_load(bench: Bench) -> None:
    """Ask for `a`, and wait until its bytes move."""
    ask(bench, "a1")
    bench.run_until(lambda: bench.loader.num_loads == 1)


def test_one_that_only_requests_wait_for(bench: Bench) -> None:
    bench.loader.load_errors["a"] = ERROR
    ask(bench, "a1", "a2")
    bench.wait_for(RequestFailed, 2)
    assert failures(bench) == [("a", "transfer_failed")]
    kinds = [type(event) for event in bench.events]
    assert kinds.index(ModelLoadFailed) < kinds.index(RequestFailed), "who hears of it may look at once"
    assert bench.of(LoadFailed) == []


def test_one_that_requests_and_loads_wait_for(bench: Bench) -> None:
    bench.loader.load_errors["a"] = ERROR
    bench.send(load_command("a"), load_command("a"))
    ask(bench, "a1")
    bench.wait_for(RequestFailed)
    assert len(bench.of(LoadFailed)) == 2
    assert failures(bench) == [("a", "transfer_failed")]


def test_one_that_nobody_waits_for_any_more(bench: Bench) -> None:
    gate = bench.loader.gates["a"] = threading.Event()
    bench.loader.load_errors["a"] = ERROR
    start_load(bench)
    bench.send(Abort(request_id="a1"))
    gate.set()
    assert len(bench.wait_for(ModelLoadFailed)) == 1


def test_a_plan_that_fails(bench: Bench) -> None:
    bench.loader.plan_errors["a"] = ERROR
    ask(bench, "a1", "a2")
    bench.wait_for(RequestFailed, 2)
    assert failures(bench) == [("a", "transfer_failed")]


def test_a_model_that_never_finds_room() -> None:
    bench = make_bench(kv_bytes=100)
    ask(bench, "a1", "a2")
    bench.wait_for(RequestFailed, 2)
    assert failures(bench) == [("a", "over_capacity")]
    ask(bench, "a3")  # its plan is known by now
    assert failures(bench) == [("a", "over_capacity")] * 2


@pytest.mark.parametrize("is_asked", [False, True])
def test_one_that_fails_after_the_model_was_ready(bench: Bench, is_asked: bool) -> None:
    gate = bench.loader.landing_gates["a"] = threading.Event()
    bench.loader.landing_errors["a"] = ERROR
    bench.send(load_command("a"))
    if is_asked:
        ask(bench, "a1", max_tokens=50)
    bench.run_until(lambda: "a" in bench.loader.runners)
    gate.set()
    bench.wait_for(ModelUnloaded)
    assert failures(bench) == [("a", "transfer_failed")]


def test_one_whose_step_has_failed_before(bench: Bench) -> None:
    gate = bench.loader.landing_gates["a"] = threading.Event()
    bench.loader.landing_errors["a"] = ERROR
    bench.send(load_command("a"))
    ask(bench, "a1", max_tokens=50)
    bench.run_until(lambda: bool(bench.tokens("a1")))
    bench.loader.runners["a"].is_broken = True
    bench.wait_for(RequestFailed)
    assert failures(bench) == [], "the load goes on"
    gate.set()
    bench.wait_for(ModelUnloaded)
    assert failures(bench) == [("a", "transfer_failed")]


def test_files_that_changed_are_looked_at_again_first(bench: Bench) -> None:
    bench.loader.load_errors["a"] = FileChanged("other bytes")
    ask(bench, "a1")
    bench.wait_for(RequestFailed)
    assert bench.loader.num_loads == 2
    assert failures(bench) == [("a", "file_changed")]


def test_an_unload_is_no_failure_and_the_next_load_may_fail_again(bench: Bench) -> None:
    bench.loader.gates["a"] = threading.Event()
    start_load(bench)
    bench.send(UnloadModel(model="a"))
    bench.loader.load_errors["a"] = ERROR
    ask(bench, "a2")
    bench.wait_for(ModelUnloaded)
    assert failures(bench) == []
    bench.run_until(lambda: bench.loader.num_loads == 2)
    bench.loader.gates["a"].set()
    bench.wait_for(RequestFailed, 2)
    assert failures(bench) == [("a", "transfer_failed")]


def test_an_unload_before_the_load_began_is_no_failure(bench: Bench) -> None:
    bench.loader.plan_gate = threading.Event()
    ask(bench, "a1")
    bench.send(load_command("a"), UnloadModel(model="a"))
    bench.wait_for(ModelUnloaded)
    assert failures(bench) == []
    bench.loader.load_errors["a"] = ERROR
    ask(bench, "a2")
    bench.loader.plan_gate.set()
    bench.wait_for(RequestFailed, 2)
    assert failures(bench) == [("a", "transfer_failed")]


def test_what_is_no_load_is_no_failure(bench: Bench) -> None:
    bench.loader.plan_errors["a"] = ERROR
    bench.send(Prefetch(model="a"), load_command("b", dtype="float16"), load_command("b", dtype="float32"))
    bench.wait_for(Prefetched)
    bench.wait_for(ModelLanded)
    assert [event.error.code for event in bench.of(LoadFailed)] == ["invalid_config"]
    assert failures(bench) == []
