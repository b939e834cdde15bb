"""What an embedded worker tells its callers when its thread cannot go on."""

import threading
import time

import pytest

from flashtensors.config import Settings
from flashtensors.errors import ConfigError, FlashError, WorkerError
from flashtensors.request import SequenceDelta
from flashtensors.worker.embedded import EmbeddedWorker
from flashtensors.worker.host import Worker
from flashtensors.worker.messages import Register, Shutdown

from .fake_models import Bench, load_command, request


def bench_worker(settings: Settings, **callbacks: object) -> Worker:
    callbacks.pop("is_embedded")
    return Bench(**callbacks).worker  # pyright: ignore


def test_a_device_that_is_not_there_reaches_the_caller() -> None:
    worker = EmbeddedWorker(Settings(device="cuda:99"))
    with pytest.raises(ConfigError, match="cuda:99"):
        worker.load(load_command("a"))
    worker.close()


def test_a_worker_that_cannot_be_made_reaches_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    def fail(settings: Settings, **callbacks: object) -> Worker:
        raise RuntimeError("CUDA driver version is insufficient")

    worker = EmbeddedWorker(Settings(), make_worker=fail)
    with pytest.raises(WorkerError, match="driver version is insufficient"):
        worker.load(load_command("a"))
    worker.close()
    assert "the worker thread failed" in caplog.text


def test_a_failure_of_the_thread_reaches_everyone_who_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = EmbeddedWorker(Settings(), make_worker=bench_worker)
    worker.load(load_command("a"))
    got: list[SequenceDelta | FlashError] = []
    has_failed = threading.Event()

    def listen(event: SequenceDelta | FlashError) -> None:
        got.append(event)
        has_failed.set()

    monkeypatch.setattr(Worker, "step", lambda self: 1 / 0)
    worker.submit(request("r", "a", max_tokens=50), listen)
    assert has_failed.wait(20)
    worker.close()
    assert isinstance(got[-1], WorkerError)
    assert "ZeroDivisionError" in got[-1].message
    with pytest.raises(WorkerError, match="ZeroDivisionError"):
        worker.submit(request("s", "a"), listen)
    assert "the worker thread failed" in caplog.text


def test_several_threads_may_wait_for_one_load() -> None:
    worker = EmbeddedWorker(Settings(), make_worker=bench_worker)
    loaded: list[str] = []
    threads = [threading.Thread(target=lambda: loaded.append(worker.load(load_command("a")).model)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert loaded == ["a"] * 4
    worker.close()


def test_a_request_that_crosses_the_close_is_answered() -> None:
    for _ in range(5):
        worker = EmbeddedWorker(Settings(), make_worker=bench_worker)
        worker.load(load_command("a"))
        errors: list[SequenceDelta | FlashError] = []
        with worker._lock, worker._inbox._changed:  # pyright: ignore
            worker._post(Shutdown())  # pyright: ignore
            worker.submit(request("r", "a", max_tokens=50), errors.append)
        worker.close()
        assert [type(error) for error in errors] == [WorkerError]


def test_a_worker_that_closes_while_a_request_brings_its_model_answers_it_and_gives_all_back() -> None:
    benches: list[Bench] = []

    def make(settings: Settings, **callbacks: object) -> Worker:
        callbacks.pop("is_embedded")
        benches.append(Bench(**callbacks))  # pyright: ignore
        benches[0].loader.gates["a"] = threading.Event()
        return benches[0].worker

    worker = EmbeddedWorker(Settings(), make_worker=make)
    got: list[SequenceDelta | FlashError] = []
    worker.register(Register(model="a", folder="/models/a"))
    worker.submit(request("r", "a"), got.append)
    while not (benches and benches[0].loader.num_loads):
        time.sleep(0.001)
    worker.close()
    (error,) = got
    assert isinstance(error, WorkerError)
    assert "closed" in error.message or "shutting down" in error.message
    assert not any(thread.name == "load a" for thread in threading.enumerate())


def test_a_worker_that_cannot_close_tells_everyone_who_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = EmbeddedWorker(Settings(), make_worker=bench_worker)
    worker.load(load_command("a"))
    got: list[SequenceDelta | FlashError] = []
    monkeypatch.setattr(Worker, "step", lambda self: 1 / 0)
    monkeypatch.setattr(Worker, "close", lambda self, error=None: 1 / 0)
    worker.submit(request("r", "a", max_tokens=50), got.append)
    worker.close()
    assert isinstance(got[-1], WorkerError)
    assert "did not give all back" in caplog.text
