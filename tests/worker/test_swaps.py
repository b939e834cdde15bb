"""What a worker does with models that come and go between disk, host memory and device, with models made of ints."""

import threading

import pytest

from flashtensors.errors import FlashError, TransferError
from flashtensors.worker.messages import (
    Deltas,
    Forget,
    Generate,
    LoadFailed,
    ModelLanded,
    ModelLoaded,
    ModelReady,
    ModelUnloaded,
    Ping,
    Pong,
    Prefetch,
    Prefetched,
    RequestFailed,
    UnloadModel,
)
from flashtensors.worker.stats import Stats

from .fake_models import WEIGHT_BYTES, Bench, FakeImages, answer_to, load_command, register, request


def ask(bench: Bench, *names: str) -> None:
    """Run requests whose first letter names their model, one after the other."""
    for name in names:
        bench.send(Generate(request=request(name, name[0])))
        bench.wait_finished(name)


def tiers(bench: Bench) -> list[tuple[str, str]]:
    firsts = [first for event in bench.of(Deltas) for first in event.first_tokens]
    return [(first.request_id, first.tier) for first in firsts]


@pytest.fixture
def bench() -> Bench:
    """Two models fit on the device and in host memory."""
    bench = Bench(images=FakeImages(150))
    bench.send(register("a"), register("b"), register("c"))
    return bench


def test_requests_swap_models_and_plans_are_made_once(bench: Bench) -> None:
    ask(bench, "a1", "b1", "c1", "a2", "b2", "c2")
    assert bench.loader.num_plans == 3
    assert {event.reason for event in bench.of(ModelUnloaded)} == {"evicted"}
    assert bench.tokens("c2") == answer_to(request("c2", "c"))


def test_a_model_comes_back_from_host_memory(bench: Bench) -> None:
    ask(bench, "a1", "a2", "b1", "b2", "c1", "a3")
    assert [(event.model, event.source) for event in bench.of(ModelLanded)] == [
        ("a", "disk"),
        ("b", "disk"),
        ("c", "disk"),
        ("a", "host"),
    ]
    assert bench.of(ModelLanded)[-1].disk_bytes == 0
    assert tiers(bench) == [
        ("a1", "disk"),
        ("a2", "device"),
        ("b1", "disk"),
        ("b2", "device"),
        ("c1", "disk"),
        ("a3", "host"),
    ]
    assert bench.loader.images.held == {"a": 60, "b": 60, "c": 30}, "c is wanted least"


def test_images_of_those_who_are_wanted_least_shrink(bench: Bench) -> None:
    ask(bench, "a1", "b1", "b2", "b3", "c1", "c2")
    bench.send(Prefetch(model="c"))
    (prefetched,) = bench.wait_for(Prefetched)
    assert prefetched.host_bytes == WEIGHT_BYTES
    held = bench.loader.images.held
    assert (held["b"], held["c"]) == (60, 60)
    assert 0 < held["a"] <= 30


def test_prefetch_reads_ahead_and_is_answered(bench: Bench) -> None:
    bench.send(Prefetch(model="a"), Prefetch(model="nobody"))
    done = {event.model: event for event in bench.wait_for(Prefetched, 2)}
    assert (done["a"].host_bytes, done["a"].image_bytes, done["a"].error) == (60, 60, None)
    assert done["nobody"].error is not None
    assert done["nobody"].error.code == "model_not_found"
    ask(bench, "a1")
    assert dict(tiers(bench))["a1"] == "host"


def test_a_request_ends_a_prefetch_of_its_model(bench: Bench) -> None:
    bench.loader.gates["a"] = threading.Event()
    bench.send(Prefetch(model="a"))
    bench.run_until(lambda: bench.loader.num_plans == 1 and not bench.worker.step())
    bench.send(Generate(request=request("a1", "a")))
    bench.run_until(lambda: bench.loader.num_loads == 1)
    bench.loader.gates["a"].set()
    bench.wait_finished("a1")
    (prefetched,) = bench.wait_for(Prefetched)
    assert prefetched.host_bytes == 60


def test_requests_start_before_the_last_layer_and_loads_are_answered_after_it(bench: Bench) -> None:
    bench.loader.landing_gates["a"] = threading.Event()
    bench.send(load_command("a"), Generate(request=request("a1", "a")))
    bench.wait_finished("a1")
    assert len(bench.of(ModelReady)) == 1
    assert bench.of(ModelLanded) == bench.of(ModelLoaded) == []
    bench.loader.landing_gates["a"].set()
    (loaded,) = bench.wait_for(ModelLoaded)
    (landed,) = bench.of(ModelLanded)
    assert set(loaded.phase_seconds) >= {"queue", "plan", "read"}
    assert (landed.num_bytes, landed.disk_bytes, landed.host_bytes) == (60, 60, 60)


def test_a_model_that_never_lands_fails_its_requests_with_the_loads_error(bench: Bench) -> None:
    ask(bench, "b1")
    bench.loader.landing_gates["a"] = threading.Event()
    bench.loader.landing_errors["a"] = TransferError("disk on fire")
    bench.send(load_command("a"), Generate(request=request("a1", "a", max_tokens=50)))
    bench.run_until(lambda: bool(bench.tokens("a1")))
    bench.wait_for_ring_after(bench.loader.landing_gates["a"].set)
    bench.wait_for(ModelUnloaded)
    assert [(event.request_id, event.error.code) for event in bench.of(RequestFailed)] == [("a1", "transfer_failed")]
    assert [event.error.code for event in bench.of(LoadFailed)] == ["transfer_failed"]
    assert [(event.model, event.reason) for event in bench.of(ModelUnloaded)] == [("a", "failed")]
    bench.loader.landing_errors.clear()
    ask(bench, "b2", "a2")


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_model_that_left_for_a_load_that_fails_serves_on(was_ready: bool) -> None:
    """Two models of which one fits."""
    bench = Bench(images=FakeImages(150), kv_bytes=20)
    bench.send(register("a"), register("b"))
    ask(bench, "b1")
    errors = bench.loader.landing_errors if was_ready else bench.loader.load_errors
    errors["a"] = TransferError("disk on fire")
    bench.send(load_command("a"))
    bench.wait_for(LoadFailed)
    bench.run_until(lambda: [event.model for event in bench.of(ModelLanded)] == ["b", "b"])
    assert bench.of(ModelLanded)[-1].source == "host"
    assert [(event.model, event.reason) for event in bench.of(ModelUnloaded)][:1] == [("b", "evicted")]
    ask(bench, "b2")
    assert dict(tiers(bench))["b2"] == "device", "it need not be asked for to be there"
    errors.clear()
    ask(bench, "a1")


def test_a_gate_that_raises_fails_the_model_with_its_error_and_others_go_on(bench: Bench) -> None:
    ask(bench, "a1", "b1")
    error = TransferError("layer 7 never came")

    def launch(plan: object) -> None:
        raise error

    bench.loader.runners["a"].launch = launch
    bench.send(Generate(request=request("a2", "a")), Generate(request=request("b2", "b")))
    bench.wait_finished("b2")
    (failed,) = bench.of(RequestFailed)
    assert (failed.error.code, failed.error.message) == ("transfer_failed", "layer 7 never came")
    assert bench.tokens("b2") == answer_to(request("b2", "b"))


def test_others_answer_while_a_model_gives_its_memory_back(bench: Bench) -> None:
    ask(bench, "a1", "b1")
    bench.loader.closing_gate = threading.Event()
    bench.send(UnloadModel(model="a"), Generate(request=request("a2", "a")))
    ask(bench, "b2")
    assert bench.of(ModelUnloaded) == []
    bench.loader.closing_gate.set()
    bench.wait_finished("a2")


def test_memory_that_cannot_be_given_back_ends_the_worker(bench: Bench) -> None:
    ask(bench, "a1")
    bench.loader.closing_error = RuntimeError("unmap failed")
    bench.send(UnloadModel(model="a"))
    with pytest.raises(RuntimeError, match="unmap failed"):
        bench.wait_for(ModelUnloaded)


def test_the_kv_cache_of_an_evicted_model_comes_back_with_it() -> None:
    bench = Bench(kv_bytes=20, kv_keep_share=0.2)
    bench.send(register("a"), register("b"))
    ask(bench, "a1", "b1")  # 80 and 80 of 150 bytes: a leaves, and 20 of its bytes stay
    assert bench.of(Stats)[-1].kept_kv_bytes == 20
    ask(bench, "a2")
    assert [grant.kept is not None for grant in bench.loader.grants] == [False, False, True]
    assert bench.of(Stats)[-1].kept_kv_bytes == 0, "more than a fifth of the device is not kept"
    bench.send(UnloadModel(model="b"))
    bench.worker.close()
    assert bench.loader.num_closed == 3


def test_a_forgotten_model_is_unknown_and_its_image_is_gone(bench: Bench) -> None:
    ask(bench, "a1")
    bench.send(Forget(model="a"), Generate(request=request("a2", "a")))
    assert bench.of(RequestFailed)[0].error.code == "model_not_found"
    assert "a" not in bench.loader.images.held
    bench.send(register("a"), UnloadModel(model="a"))
    ask(bench, "a3")
    assert bench.loader.num_plans == 2


def test_a_model_registered_with_other_files_is_planned_again(bench: Bench) -> None:
    ask(bench, "a1")
    bench.send(UnloadModel(model="a"), load_command("a", dtype="float16"))
    bench.wait_for(ModelLoaded)
    assert bench.loader.num_plans == 2


def test_images_of_an_earlier_worker_are_used() -> None:
    bench = Bench(images=FakeImages(150, {"a": 60}))
    bench.send(register("a"))
    ask(bench, "a1")
    (landed,) = bench.wait_for(ModelLanded)
    assert (landed.source, landed.disk_bytes) == ("host", 0)


def test_stats_say_where_everything_is(bench: Bench) -> None:
    ask(bench, "a1", "a2", "b1")
    stats = bench.of(Stats)[-1]
    places = {place.model: (place.tier, place.host_bytes, place.image_bytes) for place in stats.whereabouts}
    assert places == {"a": ("device", 60, 60), "b": ("device", 60, 60)}
    assert (stats.host_bytes, stats.host_free_bytes, stats.free_bytes) == (150, 30, 30)
    assert stats.hits == {"disk": 2, "device": 1}


def test_a_ping_is_answered(bench: Bench) -> None:
    bench.send(Ping())
    assert bench.of(Pong) == [Pong()]


def test_requests_wait_for_a_load_that_fails_once(bench: Bench) -> None:
    bench.loader.load_errors["a"] = FlashError("no")
    bench.send(*(Generate(request=request(name, "a")) for name in ("r", "s")))
    assert {failed.request_id for failed in bench.wait_for(RequestFailed, 2)} == {"r", "s"}
    assert bench.loader.num_loads == 1
