"""What a worker answers to each command, with models made of ints."""

import threading

import msgspec
import pytest

from flashtensors.errors import CheckpointError, RequestError
from flashtensors.request import BATCH_PRIORITY
from flashtensors.worker.messages import (
    Abort,
    Deltas,
    Generate,
    KeepAlive,
    LoadFailed,
    LoadProgress,
    ModelLoaded,
    ModelReady,
    ModelUnloaded,
    RequestFailed,
    Shutdown,
    Stats,
    UnloadModel,
)

from .fake_models import WEIGHT_BYTES, Bench, answer_to, load_command, register, request


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_loaded_model_answers(bench: Bench) -> None:
    bench.send(load_command("a"))
    (loaded,) = bench.wait_for(ModelLoaded)
    assert (loaded.model, loaded.weight_bytes, loaded.was_loaded) == ("a", WEIGHT_BYTES, False)
    asked = request("r", "a")
    bench.send(Generate(request=asked))
    bench.wait_finished("r")
    assert bench.tokens("r") == answer_to(asked)
    assert bench.finish_reasons("r") == ["length"]


def test_every_load_is_answered_and_one_is_made(bench: Bench) -> None:
    bench.send(*[load_command("a")] * 3)
    bench.wait_for(ModelLoaded, 3)
    bench.send(load_command("a"))
    assert [loaded.was_loaded for loaded in bench.of(ModelLoaded)] == [False, True, True, True]
    assert bench.loader.num_loads == 1


def test_progress_goes_from_nothing_to_all(bench: Bench) -> None:
    bench.send(load_command("a"))
    bench.wait_for(ModelLoaded)
    assert [event.done_bytes for event in bench.of(LoadProgress)] == [0, WEIGHT_BYTES]


def test_one_step_reports_all_models_in_one_message(bench: Bench) -> None:
    bench.load("a", "b")
    bench.send(Generate(request=request("r", "a")), Generate(request=request("s", "b")))
    bench.worker.step()
    (deltas,) = bench.of(Deltas)
    # models step in the order in which their loads ended
    assert sorted(delta.request_id for delta in deltas.deltas) == ["r", "s"]


def test_others_answer_while_a_model_loads(bench: Bench) -> None:
    bench.load("a")
    bench.loader.gates["b"] = threading.Event()
    bench.send(load_command("b"), Generate(request=request("r", "a")), Generate(request=request("s", "b")))
    bench.wait_finished("r")
    assert not bench.of(ModelLoaded)
    bench.loader.gates["b"].set()
    bench.wait_finished("s")
    assert bench.tokens("s") == answer_to(request("s", "b"))


def test_a_model_that_lands_holds_up_nobody_and_runs_where_it_is_alone(bench: Bench) -> None:
    bench.load("a")
    bench.loader.landing_gates["b"] = threading.Event()
    bench.send(register("b"), Generate(request=request("s", "b")))
    bench.run_until(lambda: "b" in bench.loader.runners)
    bench.wait_finished("s")  # nobody else has work: it starts before the last byte is there
    bench.send(Generate(request=request("t", "b")), Generate(request=request("r", "a")))
    bench.wait_finished("r")
    assert not bench.tokens("t")
    bench.loader.landing_gates["b"].set()
    bench.wait_finished("t")


def test_a_request_for_a_model_that_nobody_named_is_refused(bench: Bench) -> None:
    bench.send(Generate(request=request("r", "a")))
    (failed,) = bench.of(RequestFailed)
    assert (failed.request_id, failed.error.code) == ("r", "model_not_found")


def test_a_request_brings_a_registered_model(bench: Bench) -> None:
    bench.send(register("a"), *(Generate(request=request(name, "a")) for name in "rs"))
    bench.wait_finished("r", "s")
    assert bench.tokens("r") == answer_to(request("r", "a"))
    assert (bench.loader.num_plans, bench.loader.num_loads) == (1, 1)
    assert [(event.model, event.source) for event in bench.of(ModelReady)] == [("a", "disk")]
    assert bench.of(ModelLoaded) == [], "nobody asked for a load"


def test_a_request_that_comes_while_its_model_leaves_brings_it_back(bench: Bench) -> None:
    bench.load("a")
    bench.send(Generate(request=request("r", "a")), UnloadModel(model="a"), Generate(request=request("late", "a")))
    bench.wait_finished("r", "late")
    assert len(bench.of(ModelUnloaded)) == 1
    assert (bench.loader.num_plans, bench.loader.num_loads) == (1, 2), "the plan is kept"


def test_a_request_waits_out_a_reload(bench: Bench) -> None:
    bench.load("a")
    bench.send(Generate(request=request("r", "a")), UnloadModel(model="a"), load_command("a"))
    bench.send(Generate(request=request("late", "a")))
    bench.wait_finished("r", "late")
    assert bench.tokens("late") == answer_to(request("late", "a"))


def test_parked_requests_are_bounded() -> None:
    bench = Bench(max_queue=2)
    bench.loader.gates["a"] = threading.Event()
    bench.send(load_command("a"), *(Generate(request=request(name, "a")) for name in "rst"))
    (refused,) = bench.of(RequestFailed)
    assert (refused.request_id, refused.error.code) == ("t", "over_capacity")
    bench.loader.gates["a"].set()
    bench.wait_finished("r", "s")


def test_chats_have_room_in_a_queue_that_is_full_of_batch_work() -> None:
    bench = Bench(max_queue=2)
    bench.loader.gates["a"] = threading.Event()
    bench.send(load_command("a"))

    def send(*names: str) -> list[str]:
        """Those that begin with b are batch work; returns who was refused."""
        bench.events.clear()
        for name in names:
            priority = BATCH_PRIORITY if name.startswith("b") else 0
            bench.send(Generate(request=msgspec.structs.replace(request(name, "a"), priority=priority)))
        return [failed.request_id for failed in bench.of(RequestFailed)]

    assert send("b0", "b1", "b2", "c0", "c1", "c2", "b3") == ["b2", "c2", "b3"]
    bench.send(Abort(request_id="b0"), Abort(request_id="c0"))
    assert send("b4", "c3", "c4") == ["b4", "c4"], "three wait, of which two are chats"
    bench.loader.gates["a"].set()
    bench.wait_finished("b1", "c1", "c3")
    bench.worker.step()
    assert send("b5", "c5") == []
    bench.wait_finished("b5", "c5")


def test_abort_ends_all_answers_with_its_reason(bench: Bench) -> None:
    bench.load("a")
    bench.send(Generate(request=request("r", "a", max_tokens=50, n=2)))
    bench.worker.step()
    bench.send(Abort(request_id="r", index=1, finish_reason="stop"), Abort(request_id="unknown"))
    bench.worker.step()
    assert bench.finish_reasons("r") == ["stop"]
    bench.send(Abort(request_id="r"))
    bench.wait_finished("r")
    assert bench.finish_reasons("r") == ["stop", "abort"]
    bench.send(UnloadModel(model="a"))
    assert bench.wait_for(ModelUnloaded)[0].reason == "unload", "its lease was returned"


def test_abort_ends_a_request_that_waits_for_its_model(bench: Bench) -> None:
    bench.loader.gates["a"] = threading.Event()
    bench.send(load_command("a"), Generate(request=request("r", "a", n=2)), Abort(request_id="r"))
    assert bench.finish_reasons("r") == ["abort", "abort"]
    bench.loader.gates["a"].set()
    bench.wait_for(ModelLoaded)
    assert bench.tokens("r") == []


@pytest.mark.parametrize(
    ("sampling", "param"), [({"logit_bias": {64: 1.0}}, "logit_bias"), ({"stop_token_ids": [99]}, "stop_token_ids")]
)
def test_token_ids_beyond_the_vocabulary_are_refused(bench: Bench, sampling: dict[str, object], param: str) -> None:
    bench.load("a")
    bench.send(Generate(request=request("r", "a", **sampling)))
    (failed,) = bench.of(RequestFailed)
    assert (failed.error.code, failed.error.param) == (RequestError.code, param)
    assert "knows 0 to 63" in failed.error.message


def test_a_refused_request_leaves_no_lease(bench: Bench) -> None:
    bench.load("a")
    bench.send(Generate(request=request("r", "a", max_tokens=1000)), UnloadModel(model="a"))
    bench.wait_for(ModelUnloaded)
    assert len(bench.of(RequestFailed)) == 1


def test_a_request_that_cannot_be_started_fails_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.load("a")
    asked = request("r", "a")
    asked.prompt_token_ids[0] = "no id"  # pyright: ignore[reportArgumentType, reportCallIssue]
    bench.send(Generate(request=request("s", "a")), Generate(request=asked), UnloadModel(model="a"))
    bench.wait_for(ModelUnloaded)
    (failed,) = bench.of(RequestFailed)
    assert (failed.request_id, failed.error.code) == ("r", "worker_failed")
    assert "could not be started: TypeError" in failed.error.message
    assert "request r could not be started" in caplog.text
    assert bench.tokens("s") == answer_to(request("s", "a"))


def test_a_request_id_in_use_is_refused_and_the_first_goes_on(bench: Bench) -> None:
    bench.load("a")
    bench.send(Generate(request=request("r", "a")), Generate(request=request("r", "a")))
    assert bench.of(RequestFailed)[0].error.param == "request_id"
    bench.wait_finished("r")
    assert len(bench.tokens("r")) == 5


def test_a_failed_step_fails_its_model_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.load("a", "b")
    bench.loader.runners["a"].is_broken = True
    bench.send(*(Generate(request=request(name, name[0])) for name in ("a1", "a2", "b1")))
    bench.wait_finished("b1")
    failed = {event.request_id: event.error for event in bench.of(RequestFailed)}
    assert set(failed) == {"a1", "a2"}
    assert failed["a1"].code == "worker_failed"
    assert "illegal memory access" in failed["a1"].message
    assert [(event.model, event.reason) for event in bench.of(ModelUnloaded)] == [("a", "failed")]
    assert bench.tokens("b1") == answer_to(request("b1", "b"))
    assert "a step failed" in caplog.text
    bench.send(load_command("a"), Generate(request=request("again", "a")))
    bench.wait_finished("again")


@pytest.mark.parametrize("phase", ["plan", "load"])
def test_a_failed_load_is_typed_and_leaves_the_rest(bench: Bench, phase: str) -> None:
    bench.load("a")
    errors = bench.loader.plan_errors if phase == "plan" else bench.loader.load_errors
    errors["b"] = CheckpointError("model.safetensors: damaged")
    bench.send(load_command("b"), load_command("b"))
    failures = bench.wait_for(LoadFailed, 2)
    assert [failure.error.code for failure in failures] == ["invalid_checkpoint"] * 2
    bench.send(Generate(request=request("r", "a")))
    bench.wait_finished("r")
    errors.clear()
    bench.send(load_command("b"))
    bench.wait_for(ModelLoaded)


@pytest.mark.parametrize(
    ("error", "code"), [(MemoryError(), "over_capacity"), (RuntimeError("what?"), "internal_error")]
)
def test_strange_errors_of_a_load_are_typed(
    bench: Bench, error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.loader.load_errors["a"] = error
    bench.send(load_command("a"))
    (failed,) = bench.wait_for(LoadFailed)
    assert failed.error.code == code
    assert ("loading a failed" in caplog.text) is (code == "internal_error")


def test_a_third_model_evicts_the_one_used_longest_ago(bench: Bench) -> None:
    bench.load("a", "b")
    bench.send(Generate(request=request("r", "a")))
    bench.wait_finished("r")
    bench.now_s = 100.0
    bench.send(Generate(request=request("s", "a")))
    bench.wait_finished("s")
    bench.send(load_command("c"))
    bench.wait_for(ModelLoaded)
    assert [(event.model, event.reason) for event in bench.of(ModelUnloaded)] == [("b", "evicted")]


def test_an_idle_model_leaves_at_its_deadline() -> None:
    bench = Bench(keep_alive_s=30.0)
    bench.load("a")
    assert bench.worker.next_deadline() == 30.0
    bench.now_s = 29.0
    bench.worker.step()
    assert not bench.of(ModelUnloaded)
    bench.send(KeepAlive(model="a", keep_alive_s=40.0))
    bench.now_s = 40.0
    bench.worker.step()
    assert [event.reason for event in bench.wait_for(ModelUnloaded)] == ["keep_alive"]
    assert bench.worker.next_deadline() is None


def test_unload_cancels_a_load(bench: Bench) -> None:
    bench.loader.gates["a"] = threading.Event()  # never set
    bench.send(load_command("a"))
    bench.run_until(lambda: bench.loader.num_loads == 1)
    bench.send(UnloadModel(model="a"), UnloadModel(model="b"))
    bench.wait_for(ModelUnloaded, 2)
    assert {event.model: event.reason for event in bench.of(ModelUnloaded)} == {"a": "unload", "b": "not_loaded"}
    assert [event.error.code for event in bench.of(LoadFailed)] == ["over_capacity"]


def test_a_model_is_not_silently_taken_for_another(bench: Bench) -> None:
    bench.load("a")
    bench.send(load_command("a", dtype="float16"))
    (failed,) = bench.of(LoadFailed)
    assert (failed.error.code, failed.error.param) == ("invalid_config", "dtype")


def test_close_answers_everybody(bench: Bench) -> None:
    bench.load("a")
    bench.loader.gates["b"] = threading.Event()
    bench.send(Generate(request=request("r", "a")), load_command("b"), Generate(request=request("s", "b")))
    bench.worker.step()
    bench.send(Shutdown())
    assert bench.worker.is_closed
    assert {event.request_id for event in bench.of(RequestFailed)} == {"r", "s"}
    assert [event.model for event in bench.of(LoadFailed)] == ["b"]
    assert bench.loader.num_closed == 1
    bench.events.clear()
    bench.send(Generate(request=request("t", "a")), load_command("a"))
    bench.worker.close()
    assert bench.events == []


def test_stats_come_with_changes_and_once_a_second_of_work(bench: Bench) -> None:
    bench.send(load_command("a"))
    bench.wait_for(ModelLoaded)
    latest = bench.of(Stats)[-1]
    assert [model.model for model in latest.models] == ["a"]
    assert latest.free_bytes == 150 - WEIGHT_BYTES
    bench.events.clear()
    bench.worker.step()
    assert bench.of(Stats) == [], "nothing changed"
    bench.send(Generate(request=request("r", "a", max_tokens=50)))
    for _ in range(10):
        bench.worker.step()
    assert len(bench.of(Stats)) == 1
    assert bench.of(Stats)[0].models[0].num_running == 1
    bench.now_s += 1.5
    bench.worker.step()
    assert len(bench.of(Stats)) == 2
    bench.wait_finished("r")
    assert bench.of(Stats)[-1].models[0].num_running == 0
