"""What a worker is after something in it went wrong: every model can be asked again."""

import gc
import threading
import weakref

import pytest

from flashtensors.errors import TransferError
from flashtensors.worker.messages import (
    Forget,
    Generate,
    LoadFailed,
    ModelLoaded,
    ModelUnloaded,
    Prefetch,
    Prefetched,
    RequestFailed,
    UnloadModel,
)

from .fake_models import Bench, FakeImages, answer_to, load_command, register, request


@pytest.fixture
def bench() -> Bench:
    bench = Bench(images=FakeImages(150))
    bench.send(register("a"), register("b"))
    return bench


def start(bench: Bench, name: str, model: str, *, keep_alive_s: float | None = None) -> None:
    """Run a request up to its first token."""
    asked = request(name, model, max_tokens=50)
    bench.send(Generate(request=asked, keep_alive_s=keep_alive_s))
    bench.run_until(lambda: bool(bench.tokens(name)))


def test_a_model_that_leaves_at_once_after_a_broken_step_comes_back(bench: Bench) -> None:
    start(bench, "r", "a", keep_alive_s=0.0)
    bench.loader.runners["a"].is_broken = True
    bench.wait_for(RequestFailed)
    bench.send(Generate(request=request("s", "a")))
    bench.wait_finished("s")
    assert bench.tokens("s") == answer_to(request("s", "a"))


def test_who_waits_for_the_next_life_of_a_model_whose_last_one_breaks_is_answered(bench: Bench) -> None:
    start(bench, "r", "a")
    bench.send(UnloadModel(model="a"), Generate(request=request("late", "a")), load_command("a"))
    bench.loader.runners["a"].is_broken = True
    bench.wait_finished("late")
    bench.wait_for(ModelLoaded)
    assert [event.request_id for event in bench.of(RequestFailed)] == ["r"]
    assert bench.tokens("late") == answer_to(request("late", "a"))


def test_a_load_whose_model_breaks_before_it_has_landed_is_told_why(bench: Bench) -> None:
    bench.loader.landing_gates["a"] = threading.Event()
    bench.send(load_command("a"))
    start(bench, "r", "a")
    error = TransferError("layer 7 never came")

    def launch(plan: object) -> None:
        raise error

    bench.loader.runners["a"].launch = launch
    bench.wait_for(RequestFailed)
    bench.loader.landing_gates["a"].set()
    bench.wait_for(ModelUnloaded)
    assert [event.error.message for event in bench.of(LoadFailed)] == ["layer 7 never came"]
    bench.send(Generate(request=request("s", "a")))
    bench.wait_finished("s")


def test_a_model_that_is_forgotten_while_a_prefetch_plans_it_fails_the_prefetch_alone(bench: Bench) -> None:
    bench.loader.plan_gate = threading.Event()
    bench.send(Prefetch(model="a"), Forget(model="a"))
    bench.loader.plan_gate.set()
    (prefetched,) = bench.wait_for(Prefetched)
    assert prefetched.error is not None
    assert prefetched.error.code == "model_not_found"
    bench.send(register("a"), Generate(request=request("r", "a")), Generate(request=request("s", "b")))
    bench.wait_finished("r", "s")


def test_a_broken_model_does_not_outlive_its_end(bench: Bench) -> None:
    def launch(plan: object) -> None:
        raise TransferError("layer 7 never came")

    start(bench, "r", "a")
    gc.collect()
    gc.disable()
    try:
        bench.loader.runners["a"].launch = launch
        runner = weakref.ref(bench.loader.runners.pop("a"))
        bench.wait_for(ModelUnloaded)
        bench.send(Generate(request=request("s", "b")))
        bench.wait_finished("s")
        assert runner() is None, "its memory waits for a collection of garbage"
    finally:
        gc.enable()
