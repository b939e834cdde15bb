"""What the daemon makes of what a worker says of its models."""

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from flashtensors.errors import TransferError
from flashtensors.server.metrics import Metrics
from flashtensors.server.worker_models import WorkerModels
from flashtensors.worker.messages import (
    Event,
    Generate,
    LoadFailed,
    LoadProgress,
    ModelUnloaded,
    RequestFailed,
    UnloadModel,
)

from ..worker.fake_models import Bench, load_command, register, request


class Listener:
    """A worker with models made of ints, and what the daemon makes of its events."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.models = WorkerModels(self.metrics)
        self.events: list[Event] = []
        self.bench = Bench(emit=self._take)
        self.bench.events = self.events
        self.bench.send(register("a"))

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.models.route(event)

    def load_failures(self) -> dict[str, float]:
        """Failed loads of `a`, by code."""
        return {
            one.labels["code"]: one.value
            for family in text_string_to_metric_families(self.metrics.render().decode())
            for one in family.samples
            if one.name == "flashtensors_model_load_failures_total" and one.labels["model_name"] == "a"
        }


@pytest.fixture
def listener() -> Listener:
    return Listener()


def ask(listener: Listener, *names: str) -> None:
    listener.bench.send(*(Generate(request=request(name, "a")) for name in names))


def test_a_load_that_fails_for_requests_is_over_and_counts_once(listener: Listener) -> None:
    bench = listener.bench
    gate = bench.loader.gates["a"] = threading.Event()
    bench.loader.load_errors["a"] = TransferError("disk on fire")
    ask(listener, "r", "s")
    bench.wait_for(LoadProgress)
    assert set(listener.models.progress) == {"a"}
    gate.set()
    bench.wait_for(RequestFailed, 2)
    assert listener.models.progress == {}
    assert listener.load_failures() == {"transfer_failed": 1}


def test_a_load_that_fails_for_many_callers_counts_once(listener: Listener) -> None:
    listener.bench.loader.load_errors["a"] = TransferError("disk on fire")
    listener.bench.send(load_command("a"), load_command("a"), load_command("a"))
    listener.bench.wait_for(LoadFailed, 3)
    assert listener.models.progress == {}
    assert listener.load_failures() == {"transfer_failed": 1}


@pytest.mark.parametrize("is_landing", [False, True])
def test_an_unload_of_a_model_that_loads_is_no_failure(listener: Listener, is_landing: bool) -> None:
    bench = listener.bench
    (bench.loader.landing_gates if is_landing else bench.loader.gates)["a"] = threading.Event()
    bench.send(load_command("a"))
    bench.run_until(lambda: "a" in bench.loader.runners if is_landing else bench.loader.num_loads == 1)
    bench.send(UnloadModel(model="a"))
    bench.wait_for(ModelUnloaded)
    assert listener.models.progress == listener.models.loaded == {}
    assert listener.load_failures() == {}


def test_a_refused_load_leaves_the_progress_of_the_one_that_runs(listener: Listener) -> None:
    listener.bench.loader.gates["a"] = threading.Event()
    ask(listener, "r")
    listener.bench.wait_for(LoadProgress)
    listener.bench.send(load_command("a", dtype="float16"))
    assert len(listener.bench.of(LoadFailed)) == 1
    assert set(listener.models.progress) == {"a"}
    assert listener.load_failures() == {}
    listener.bench.worker.close()
