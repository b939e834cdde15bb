"""The worker: models of one device, their requests, and the loop that advances them.

    handle(command) ─▶ load or unload a model, or give a request to its engine
    step()          ─▶ every engine with work advances by one step ─▶ one `Deltas` for all

All methods run on one thread, the worker's own; only plans and loads run beside it, and they report through a queue.
A request for a model that is loading or leaving is parked until that is over. A request for a model that is not there
fails with `ModelNotFound`: nothing was generated, so whoever sent it can load the model and send it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import assert_never

from ..config import Settings
from ..errors import CapacityError, FlashError, ModelNotFound, RequestError, WorkerError
from ..request import EngineRequest, SequenceDelta
from ..residency.machine import Residency
from ..residency.tiers import State
from .background import BackgroundLoads
from .checkpoint_loader import CheckpointLoader
from .device import Device, open_device
from .loading import LoadedModel, Loader
from .messages import (
    Abort,
    Command,
    Deltas,
    Event,
    Generate,
    KeepAlive,
    LoadModel,
    RequestFailed,
    Shutdown,
    UnloadModel,
    WireError,
)
from .requests import RequestTable
from .resident_models import ResidentModels
from .sizing import kv_share

_log = logging.getLogger(__name__)

STATS_INTERVAL_S = 1.0
"""Time between two reports while there is work; a worker without work reports changes only."""


def _sleep_on() -> None:
    """Stand in for a caller who calls `step` without being woken."""


class Worker:
    """Holds models and runs their requests, in the caller's process and on the caller's thread.

    Args:
        settings: Device, sizes and limits.
        emit: Called with every event, on the thread that calls `handle` and `step`.
        wake: Called from any thread when `step` has something to do though no command came.
        is_embedded: It holds one caller's model: any number of requests may wait, and a KV cache may take all that is
            free.
        device: Where models go; None: what the settings say.
        loader: Reads models; None: folders of safetensors.
        clock: Seconds, for keep-alives and reports.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        emit: Callable[[Event], None],
        wake: Callable[[], None] = _sleep_on,
        is_embedded: bool = False,
        device: Device | None = None,
        loader: Loader | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device or open_device(settings)
        self.is_closed = False
        self._emit = emit
        self._clock = clock
        self._max_queue = None if is_embedded else settings.max_queue
        residency = Residency(
            self.device.budget_bytes,
            keep_alive_s=settings.keep_alive_s,
            flexible_share=kv_share(self.device, is_embedded=is_embedded),
        )
        loader = loader or CheckpointLoader(settings, self.device, max_queue=self._max_queue, is_embedded=is_embedded)
        self._loader = loader
        self._models = ResidentModels(residency, BackgroundLoads(loader, wake), self.device, emit=emit, clock=clock)
        self._requests = RequestTable()
        self._was_busy = False
        self._num_changes_reported = 0
        self._stats_due_s = 0.0

    def handle(self, command: Command) -> None:
        """Obey a command; what goes wrong with it is an event, never an exception. Call `step` afterwards.

        A closed worker ignores commands: everything it had was answered, and its owner answers what comes later.
        """
        if self.is_closed:
            return
        match command:
            case Generate(request=request):
                self._generate(request)
            case Abort():
                self._abort(command)
            case LoadModel():
                self._models.load(command)
            case UnloadModel(model=model):
                self._models.unload(model)
            case KeepAlive(model=model, keep_alive_s=keep_alive_s):
                self._models.set_keep_alive(model, keep_alive_s)
            case Shutdown():
                self.close()
            case _:
                assert_never(command)

    def step(self) -> bool:
        """Take in finished loads and passed deadlines, and advance every engine by one step.

        Returns:
            Whether there is more to compute now; if not, wait for a command, a wake-up or `next_deadline`.
        """
        self._models.advance()
        self._unpark()
        deltas: list[SequenceDelta] = []
        failures: dict[str, str] = {}
        for model, loaded in list(self._models.loaded.items()):
            if loaded.engine.has_work:
                deltas += self._step_model(model, loaded)
                failures |= loaded.engine.take_failures()
        if deltas:
            self._emit(Deltas(deltas=deltas))
        ended = self._requests.finish(deltas) + [self._fail_running(*failure) for failure in failures.items()]
        if ended:
            for model in ended:
                self._models.release(model)
            self._unpark()
        is_busy = any(loaded.engine.has_work for loaded in self._models.loaded.values())
        self._report_stats(is_busy=is_busy)
        return is_busy

    def next_deadline(self) -> float | None:
        """When `step` must be called though nothing happens, in the clock's seconds; None: never."""
        return self._models.next_deadline()

    def close(self, error: FlashError | None = None) -> None:
        """Fail all that runs or waits with `error`, and give the memory back; closing twice is harmless."""
        if self.is_closed:
            return
        self.is_closed = True
        error = error or WorkerError("the worker is shutting down; try again")
        for request_id in self._requests.take_all():
            self._fail_request(request_id, error)
        self._models.close(error)
        self._loader.close()

    def _generate(self, request: EngineRequest) -> None:
        try:
            self._requests.check_new(request)
            loaded = self._models.acquire(request.model)
            if loaded is None:
                self._park(request)
            else:
                self._start(request, loaded)
        except FlashError as error:
            self._fail_request(request.request_id, error)

    def _start(self, request: EngineRequest, loaded: LoadedModel) -> None:
        """Give a request to the engine of its model, which was acquired for it."""
        try:
            _check_token_ids(request, loaded.vocab_size)
            loaded.engine.add(request, loaded.eos_token_ids)
        except FlashError:
            self._models.release(request.model)
            raise
        self._requests.start(request)

    def _park(self, request: EngineRequest) -> None:
        if self._models.state(request.model) is State.ABSENT:
            raise ModelNotFound(f"{request.model} is not loaded on {self.device.name}; load it first", param="model")
        if self._max_queue is not None and self._requests.num_parked(request.model) >= self._max_queue:
            raise CapacityError(
                f"{self._max_queue} requests wait for {request.model} already (max_queue); try again later"
            )
        self._requests.park(request)

    def _unpark(self) -> None:
        """Send on parked requests whose model is now ready or gone."""
        for model in self._requests.parked_models():
            if self._models.state(model) in (State.READY, State.ABSENT):
                for request in self._requests.take_parked(model):
                    self._generate(request)

    def _abort(self, command: Abort) -> None:
        deltas = self._requests.abort_parked(command.request_id, command.index, command.finish_reason)
        if deltas:
            self._emit(Deltas(deltas=deltas))
        model = self._requests.find_model(command.request_id)
        if model is not None:
            self._models.loaded[model].engine.abort(command.request_id, command.index, command.finish_reason)

    def _step_model(self, model: str, loaded: LoadedModel) -> list[SequenceDelta]:
        try:
            return loaded.engine.step()
        except Exception as error:
            # Whatever broke, only this model's state can be wrong: its requests fail, the other models go on.
            _log.exception("%s: a step failed", model)
            failure = WorkerError(f"{model}: a step failed: {type(error).__name__}: {error}")
        for request_id in self._requests.take_running(model):
            self._fail_request(request_id, failure)
            self._models.release(model)
        self._models.fail(model)
        return []

    def _fail_running(self, request_id: str, reason: str) -> str:
        """End a request that its model cannot go on with; returns the model."""
        model = self._requests.take(request_id)
        self._fail_request(request_id, WorkerError(f"{model}: {reason}"))
        return model

    def _fail_request(self, request_id: str, error: FlashError) -> None:
        self._emit(RequestFailed(request_id=request_id, error=WireError.of(error)))

    def _report_stats(self, *, is_busy: bool) -> None:
        now_s = self._clock()
        num_changes = self._models.num_changes
        is_due = is_busy and now_s >= self._stats_due_s
        if not is_due and is_busy == self._was_busy and num_changes == self._num_changes_reported:
            return
        self._was_busy, self._num_changes_reported = is_busy, num_changes
        self._stats_due_s = now_s + STATS_INTERVAL_S
        self._emit(self._models.stats())


def _check_token_ids(request: EngineRequest, vocab_size: int) -> None:
    """Refuse ids that are not rows of the model's embedding."""
    sampling = request.sampling
    named = {
        "prompt": request.prompt_token_ids,
        "logit_bias": list(sampling.logit_bias),
        "stop_token_ids": sampling.stop_token_ids,
    }
    for param, token_ids in named.items():
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise RequestError(
                f"{param} holds token id {wrong}, but {request.model} knows 0 to {vocab_size - 1}", param=param
            )
