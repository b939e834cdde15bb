"""The worker: models of one device, their requests, and the loop that advances them.

    handle(command) ─▶ load or unload a model, or park a request until its model is there
    step()          ─▶ every engine with work advances by one step ─▶ one `Deltas` for all

All methods run on one thread, the worker's own; only plans, loads and fills run beside it, and they report through a
queue. A request for a model that was registered brings the model to the device; one for a model that nobody named
fails with `ModelNotFound`.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable
from typing import assert_never

from ..config import Settings
from ..errors import CapacityError, FlashError, WorkerError
from ..request import EngineRequest, SequenceDelta
from ..residency.machine import Residency
from .background import BackgroundLoads
from .checkpoint_loader import CheckpointLoader
from .device import Device, open_device
from .host_tier import HostTier
from .loading import LoadedModel, Loader
from .messages import (
    Abort,
    Command,
    Deltas,
    Event,
    Forget,
    Generate,
    KeepAlive,
    LoadModel,
    Ping,
    Pong,
    Prefetch,
    Register,
    RequestFailed,
    Shutdown,
    UnloadModel,
    WireError,
)
from .ports import Images
from .requests import RequestTable, check_token_ids, last_deltas
from .resident_models import ResidentModels
from .sizing import kv_share
from .whereabouts import make_stats

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
        host_pool_fd: A memory file for the host tier that outlives this process; borrowed.
        device: Where models go; None: what the settings say.
        loader: Reads models; None: folders of safetensors.
        images: Models in host memory; None: the loader's.
        clock: Seconds, for keep-alives and reports.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        emit: Callable[[Event], None],
        wake: Callable[[], None] = _sleep_on,
        is_embedded: bool = False,
        host_pool_fd: int | None = None,
        device: Device | None = None,
        loader: Loader | None = None,
        images: Images | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device or open_device(settings)
        self.is_closed = False
        self._emit = emit
        self._clock = clock
        self._max_queue = None if is_embedded else settings.max_queue
        if loader is None:
            loader = CheckpointLoader(
                settings,
                self.device,
                max_queue=self._max_queue,
                is_embedded=is_embedded,
                host_pool_fd=host_pool_fd,
            )
            images = loader.host_tier
        self._loader = loader
        images = images or HostTier(None)
        residency = Residency(
            self.device.budget_bytes,
            host_bytes=images.capacity_bytes,
            keep_alive_s=settings.keep_alive_s,
            flexible_share=kv_share(self.device, is_embedded=is_embedded),
            kept_share=settings.kv_keep_share,
            patience_s=settings.swap_patience_s,
        )
        self._models = ResidentModels(residency, BackgroundLoads(loader, wake), images, self, emit=emit, clock=clock)
        self._requests = RequestTable()
        self._broken: list[tuple[str, FlashError]] = []
        self._hits: collections.Counter[str] = collections.Counter()
        self._was_busy = False
        self._num_changes_reported = 0
        self._stats_due_s = 0.0

    @property
    def host_bytes(self) -> int:
        """Host memory for models' images; 0: there is no host tier."""
        return self._models.residency.host.capacity_bytes

    def handle(self, command: Command) -> None:
        """Obey a command; what goes wrong with it is an event, never an exception. Call `step` afterwards.

        A closed worker ignores commands: everything it had was answered, and its owner answers what comes later.
        """
        if self.is_closed:
            return
        match command:
            case Generate():
                self._generate(command)
            case Abort():
                self._abort(command)
            case Ping():
                self._emit(Pong())
            case Shutdown():
                self.close()
            case _:
                self._handle_model(command)

    def _handle_model(self, command: Register | Forget | LoadModel | Prefetch | UnloadModel | KeepAlive) -> None:
        match command:
            case Register():
                self._models.register(command)
            case Forget(model=model):
                self._models.forget(model)
            case LoadModel():
                self._models.load(command)
            case Prefetch(model=model):
                self._models.prefetch(model)
            case UnloadModel(model=model):
                self._models.unload(model)
            case KeepAlive(model=model, keep_alive_s=keep_alive_s):
                self._models.set_keep_alive(model, keep_alive_s)
            case _:
                assert_never(command)

    def step(self) -> bool:
        """Take in finished loads and passed deadlines, and advance every engine by one step.

        Returns:
            Whether there is more to compute now; if not, wait for a command, a wake-up or `next_deadline`.
        """
        self._models.advance()
        deltas: list[SequenceDelta] = []
        failures: dict[str, str] = {}
        for model, loaded in self._models.working():
            deltas += self._step_model(model, loaded)
            failures |= loaded.engine.take_failures()
        if deltas:
            self._emit(Deltas(deltas=deltas, first_tokens=self._requests.first_tokens(deltas, self._clock())))
        ended = self._requests.finish(deltas) + [self._fail_running(*failure) for failure in failures.items()]
        for model in ended:
            self._models.release(model)
        self._fail_broken()
        is_busy = bool(self._models.working())
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

    def _generate(self, command: Generate) -> None:
        request = command.request
        try:
            self._requests.check_new(request)
            self._models.check_known(request.model)
            self._check_queue(request)
        except FlashError as error:
            self._fail_request(request.request_id, error)
            return
        tier = self._models.residency.tier(request.model).value
        self._hits[tier] += 1
        self._requests.park(request, tier, self._clock())
        self._models.request(request.request_id, request.model, command.keep_alive_s)

    def _check_queue(self, request: EngineRequest) -> None:
        """As the engine does, for requests whose model is on its way."""
        num_parked = self._requests.num_parked(request.model, with_batch_work=request.is_batch)
        if self._max_queue is not None and num_parked >= self._max_queue:
            raise CapacityError(f"{num_parked} requests wait for {request.model} already (max_queue); try again later")

    # What `ResidentModels` tells.

    def start_request(self, request_id: str, loaded: LoadedModel) -> None:
        """Give a request to the engine of its model; it has a lease."""
        request = self._requests.start(request_id, self._clock())
        try:
            check_token_ids(request, loaded.vocab_size)
            loaded.engine.add(request, loaded.eos_token_ids)
        except Exception as error:  # whatever is wrong with one request, the others go on
            if not isinstance(error, FlashError):
                _log.exception("%s: request %s could not be started", request.model, request_id)
                error = WorkerError(f"the request could not be started: {type(error).__name__}: {error}")
            self._requests.take(request_id)
            self._fail_request(request_id, error)
            self._models.release(request.model)

    def refuse_request(self, request_id: str, error: FlashError) -> None:
        """A parked request has waited in vain."""
        self._requests.unpark(request_id)
        self._fail_request(request_id, error)

    def fail_requests(self, model: str, error: FlashError) -> None:
        """End all that runs on a model, and return the leases."""
        for request_id in self._requests.take_running(model):
            self._fail_request(request_id, error)
            self._models.release(model)

    def _abort(self, command: Abort) -> None:
        request_id, index = command.request_id, command.index
        parked = self._requests.find_parked(request_id)
        if parked is not None:
            if index is None or parked.sampling.n == 1:  # else the others still wait
                self._requests.unpark(request_id)
                self._models.give_up(request_id, parked.model)
                self._emit(Deltas(deltas=last_deltas(parked, command.finish_reason)))
            return
        model = self._requests.find_model(request_id)
        if model is not None:
            self._models.loaded[model].engine.abort(request_id, index, command.finish_reason)

    def _step_model(self, model: str, loaded: LoadedModel) -> list[SequenceDelta]:
        try:
            return loaded.engine.step()
        except FlashError as error:  # a layer that never came: the load says what went wrong
            self._broken.append((model, error))
        except Exception as error:
            _log.exception("%s: a step failed", model)
            self._broken.append((model, WorkerError(f"{model}: a step failed: {type(error).__name__}: {error}")))
        return []

    def _fail_broken(self) -> None:
        """Fail the models whose steps failed; whatever broke, only their state can be wrong, and the others go on.

        Not done where the errors are caught: what they have passed through would hold them, and they the models.
        """
        while self._broken:
            model, error = self._broken.pop()
            self._models.fail(model, error)
            self.fail_requests(model, error)

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
        self._emit(make_stats(self._models.residency, self._models.loaded, self._hits, now_s))
