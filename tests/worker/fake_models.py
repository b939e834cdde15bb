"""Models without weights for a worker: a loader that tests hold back or break, and a bench that drives the worker."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from flashtensors.config import Settings
from flashtensors.engine.loop import Engine
from flashtensors.errors import TransferError
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.residency.tiers import Demand
from flashtensors.step import RunnerLimits, StepPlan, StepResult
from flashtensors.testing.fake_runner import FakeRunner, fake_answer
from flashtensors.transfer.pipeline import LoadStats
from flashtensors.worker.device import Device
from flashtensors.worker.host import Worker
from flashtensors.worker.loading import Grant, LoadedModel, OnReady, Progress
from flashtensors.worker.messages import Command, Deltas, Event, LoadModel, ModelLoaded, Register

EVENT = TypeVar("EVENT")

WEIGHT_BYTES = 60
VOCAB_SIZE = 64
LIMITS = RunnerLimits(num_blocks=64, block_size=4, max_slots=8, max_tokens_per_step=32, max_model_len=64)


class BreakableRunner(FakeRunner):
    """Raises at its next launch once it is told to."""

    def __init__(self, limits: RunnerLimits, *, vocab_size: int) -> None:
        super().__init__(limits, vocab_size=vocab_size)
        self.is_broken = False

    def launch(self, plan: StepPlan) -> None:
        if self.is_broken:
            raise RuntimeError("illegal memory access")
        super().launch(plan)

    def collect(self) -> StepResult:
        return super().collect()


@dataclass
class FakeImages:
    """Models in host memory, as numbers of bytes."""

    capacity_bytes: int = 0
    held: dict[str, int] = field(default_factory=dict)

    def names(self) -> list[str]:
        return [model for model, num_bytes in self.held.items() if num_bytes]

    def held_bytes(self, model: str) -> int:
        return self.held.get(model, 0)

    def trim(self, model: str, keep_bytes: int) -> int:
        self.held[model] = keep_bytes // 4 * 4  # pages of four bytes
        return self.held[model]

    def drop(self, model: str) -> None:
        self.held.pop(model, None)


class FakeKept:
    """A KV cache that its model left behind."""

    def __init__(self, loader: "FakeLoader", num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._loader = loader

    def close(self) -> None:
        self._loader.num_kept_closed += 1


@dataclass
class FakeLoader:
    """Plans and loads models whose weights take `WEIGHT_BYTES`."""

    images: FakeImages = field(default_factory=FakeImages)
    kv_bytes: int = 0
    """Of every model's KV cache."""
    plan_errors: dict[str, Exception] = field(default_factory=dict)
    load_errors: dict[str, Exception] = field(default_factory=dict)
    landing_errors: dict[str, Exception] = field(default_factory=dict)
    """What goes wrong after the model was ready."""
    gates: dict[str, threading.Event] = field(default_factory=dict)
    """Loads and fills of these models wait for the event."""
    landing_gates: dict[str, threading.Event] = field(default_factory=dict)
    """Loads of these models wait for the event after they were ready."""
    runners: dict[str, BreakableRunner] = field(default_factory=dict)
    grants: list[Grant] = field(default_factory=list)
    plan_gate: threading.Event | None = None
    """Plans wait for the event."""
    closing_gate: threading.Event | None = None
    """Models give their memory back after the event."""
    closing_error: Exception | None = None
    expected: list[str] = field(default_factory=list)
    """Models that it was told of."""
    num_plans: int = 0
    num_loads: int = 0
    num_closed: int = 0
    num_kept_closed: int = 0

    def expect(self, command: Register | LoadModel) -> None:
        self.expected.append(command.model)

    def plan(self, command: LoadModel) -> "FakePlan":
        if command.model in self.plan_errors:
            raise self.plan_errors[command.model]
        if self.plan_gate is not None:
            self.plan_gate.wait(20)
        self.num_plans += 1
        return FakePlan(self, command.model)

    def close_model(self, *, keeps_kv: bool = False) -> FakeKept | None:
        if self.closing_gate is not None:
            self.closing_gate.wait(20)
        if self.closing_error is not None:
            raise self.closing_error
        self.num_closed += 1
        return FakeKept(self, self.kv_bytes) if keeps_kv else None

    def close(self) -> None:
        pass


@dataclass
class FakePlan:
    loader: FakeLoader
    model: str

    @property
    def demand(self) -> Demand:
        kv_bytes = self.loader.kv_bytes
        return Demand(fixed_bytes=WEIGHT_BYTES, min_flexible_bytes=kv_bytes, max_flexible_bytes=kv_bytes)

    @property
    def host_bytes(self) -> int:
        return WEIGHT_BYTES if self.loader.images.capacity_bytes else 0

    def fill(self, host_bytes: int, progress: Progress, cancel: threading.Event) -> LoadStats:
        self._wait(self.loader.gates, cancel)
        self.loader.images.held[self.model] = host_bytes
        return LoadStats(num_bytes=host_bytes, phase_seconds={}, reader="none")

    def load(self, grant: Grant, progress: Progress, cancel: threading.Event, on_ready: OnReady) -> LoadStats:
        loader = self.loader
        loader.num_loads += 1
        loader.grants.append(grant)
        for done_bytes in range(0, WEIGHT_BYTES + 1, 10):
            progress("read", done_bytes, WEIGHT_BYTES)
        self._wait(loader.gates, cancel)
        if self.model in loader.load_errors:
            raise loader.load_errors[self.model]
        held_bytes = loader.images.held_bytes(self.model)
        on_ready(self._loaded())
        self._wait(loader.landing_gates, cancel)
        if self.model in loader.landing_errors:
            raise loader.landing_errors[self.model]
        if grant.host_bytes:
            loader.images.held[self.model] = grant.host_bytes
        return LoadStats(
            num_bytes=WEIGHT_BYTES, phase_seconds={"read": 0.0}, reader="direct", host_tier_bytes=held_bytes
        )

    def _loaded(self) -> LoadedModel:
        loader = self.loader
        runner = loader.runners[self.model] = BreakableRunner(LIMITS, vocab_size=VOCAB_SIZE)
        return LoadedModel(
            engine=Engine(runner),
            limits=LIMITS,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(),
            weight_bytes=WEIGHT_BYTES,
            kv_cache_bytes=loader.kv_bytes,
            dtype="float32",
            close=loader.close_model,
        )

    def _wait(self, gates: dict[str, threading.Event], cancel: threading.Event) -> None:
        if self.model in gates:
            while not gates[self.model].wait(0.001):
                if cancel.is_set():
                    raise TransferError("the load was cancelled")


class Bench:
    """A worker on a device of 150 bytes, so that two models fit and three do not, and all that it says."""

    def __init__(
        self,
        *,
        emit: Callable[[Event], None] | None = None,
        wake: Callable[[], None] | None = None,
        images: FakeImages | None = None,
        kv_bytes: int = 0,
        **settings: object,
    ) -> None:
        self.events: list[Event] = []
        self.loader = FakeLoader(images=images or FakeImages(), kv_bytes=kv_bytes)
        self.now_s = 0.0
        self._bell = threading.Semaphore(0)
        self.worker = Worker(
            Settings(**settings),  # pyright: ignore
            emit=emit or self.events.append,
            wake=wake or self._bell.release,
            device=Device(name="cpu", description="fake", budget_bytes=150),
            loader=self.loader,
            images=self.loader.images,
            clock=lambda: self.now_s,
        )

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.worker.handle(command)

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Step while there is work, wait for a ring otherwise; fails when neither comes."""
        for _ in range(1000):
            is_busy = self.worker.step()
            if is_done():
                return
            if not is_busy:
                assert self._bell.acquire(timeout=5), f"the worker sleeps and is not done: {self.events}"
        raise AssertionError(f"not done after 1000 steps: {self.events}")

    def wait_for_ring_after(self, cause: Callable[[], None]) -> None:
        """Cause what a thread tells the worker of, and wait until it has, without a step in between."""
        while self._bell.acquire(blocking=False):
            pass
        cause()
        assert self._bell.acquire(timeout=5), "nothing rang"

    def of(self, kind: type[EVENT]) -> list[EVENT]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait_for(self, kind: type[EVENT], count: int = 1) -> list[EVENT]:
        self.run_until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)

    def load(self, *models: str) -> None:
        self.send(*(load_command(model) for model in models))
        self.run_until(lambda: {event.model for event in self.of(ModelLoaded)} == set(models))
        self.events.clear()

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        deltas = (delta for event in self.of(Deltas) for delta in event.deltas)
        mine = [delta for delta in deltas if (delta.request_id, delta.index) == (request_id, index)]
        return [token_id for delta in mine for token_id in delta.token_ids]

    def finish_reasons(self, request_id: str) -> list[str]:
        deltas = (delta for event in self.of(Deltas) for delta in event.deltas if delta.request_id == request_id)
        return [delta.finish_reason for delta in deltas if delta.finish_reason is not None]

    def wait_finished(self, *request_ids: str) -> None:
        self.run_until(lambda: all(self.finish_reasons(request_id) for request_id in request_ids))


def load_command(model: str, **fields: object) -> LoadModel:
    return LoadModel(model=model, folder=f"/models/{model}", **fields)  # pyright: ignore


def register(model: str) -> Register:
    return Register(model=model, folder=f"/models/{model}")


def request(request_id: str, model: str, *, max_tokens: int = 5, **sampling: object) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **sampling)  # pyright: ignore
    return EngineRequest(request_id=request_id, model=model, prompt_token_ids=[5, 6, 7], sampling=params)


def answer_to(asked: EngineRequest) -> list[int]:
    max_length = len(asked.prompt_token_ids) + (asked.sampling.max_tokens or 0)
    return fake_answer(asked.prompt_token_ids, asked.sampling, seed=0, max_length=max_length, vocab_size=VOCAB_SIZE)
