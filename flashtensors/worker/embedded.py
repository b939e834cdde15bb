"""The worker on a thread of the caller's process."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ..config import Settings
from ..errors import FlashError, WorkerError
from ..request import EngineRequest, SequenceDelta
from .host import Worker
from .inbox import Inbox
from .messages import (
    Abort,
    Command,
    Deltas,
    Event,
    Generate,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    Prefetch,
    Prefetched,
    Register,
    RequestFailed,
    Shutdown,
    UnloadModel,
)
from .stats import Stats

_log = logging.getLogger(__name__)

Listener = Callable[[SequenceDelta | FlashError], None]
"""Called on the worker's thread with what a request yields; must not block or raise."""


@dataclass
class _Open:
    listener: Listener
    num_open: int


@dataclass(frozen=True)
class _Load:
    future: Future[ModelLoaded]
    progress: Callable[[LoadProgress], None] | None


class EmbeddedWorker:
    """A worker, its thread, and the way in and out for any number of other threads.

    The thread blocks while there is nothing to do. What goes wrong in it reaches every caller that waits.

    Args:
        settings: Of the worker.
        make_worker: Makes it, on its thread.
        on_event: Called with every event, on the worker's thread, before it is routed; must not block or raise.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        make_worker: Callable[..., Worker] = Worker,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.stats: Stats | None = None
        """The worker's latest report."""
        self._settings = settings
        self._make_worker = make_worker
        self._on_event = on_event
        self._lock = threading.RLock()  # a finaliser may close this on a thread that is in here
        self._inbox = Inbox()
        self._failure: FlashError | None = None
        self._requests: dict[str, _Open] = {}
        self._loads: dict[str, list[_Load]] = {}
        self._prefetches: dict[str, list[Future[Prefetched]]] = {}
        self._thread = threading.Thread(target=self._run, name="flashtensors worker", daemon=True)
        self._thread.start()

    def load(self, command: LoadModel, progress: Callable[[LoadProgress], None] | None = None) -> ModelLoaded:
        """Load a model and wait for it; raises what went wrong. `progress` is called on the worker's thread."""
        load = _Load(Future(), progress)
        with self._lock:
            self._raise_failure()
            self._loads.setdefault(command.model, []).append(load)
            self._inbox.put(command)
        return load.future.result()

    def register(self, command: Register) -> None:
        """Let requests for a model bring it to the device by themselves."""
        self._post(command)

    def prefetch(self, model: str) -> Prefetched:
        """Bring a registered model into host memory and wait for it; raises what went wrong."""
        future: Future[Prefetched] = Future()
        with self._lock:
            self._raise_failure()
            self._prefetches.setdefault(model, []).append(future)
            self._inbox.put(Prefetch(model=model))
        return future.result()

    def unload(self, model: str) -> None:
        """Take a model off the device once its requests have ended; does not wait."""
        self._post(UnloadModel(model=model))

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Run a request; `listener` gets its deltas up to the last of every answer, or one error."""
        with self._lock:
            self._raise_failure()
            self._requests[request.request_id] = _Open(listener, request.sampling.n)
            self._inbox.put(Generate(request=request))

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        """Stop a request, or one of its answers; ignored when it has ended."""
        with self._lock:
            if self._failure is None and request_id in self._requests:
                self._inbox.put(Abort(request_id=request_id, index=index, finish_reason=finish_reason))

    def close(self) -> None:
        """Stop the worker, fail what still runs, and give its memory back; closing twice is harmless."""
        with self._lock:
            if self._failure is None:
                self._inbox.put(Shutdown())
        if threading.current_thread() is not self._thread:  # a finaliser may run anywhere
            self._thread.join()

    def _post(self, command: Command) -> None:
        """Queue a command that nobody waits for."""
        with self._lock:
            self._raise_failure()
            self._inbox.put(command)

    def _raise_failure(self) -> None:
        """Raise what ended the worker; the caller holds the lock."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            worker = self._make_worker(self._settings, emit=self._route, wake=self._inbox.ring, is_embedded=True)
        except Exception as error:
            self._fail_everything(_describe(error))
            return
        failure: FlashError = WorkerError("this engine is closed; make a new one")
        try:
            self._inbox.serve(worker)
        except Exception as error:
            failure = _describe(error)
        try:
            worker.close(failure)
        except Exception:
            _log.exception("the worker did not give all back")
        self._fail_everything(failure)

    def _route(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)
        match event:
            case Deltas(deltas=deltas):
                for delta in deltas:
                    self._deliver(delta)
            case RequestFailed(request_id=request_id, error=error):
                request = self._requests.pop(request_id, None)
                if request is not None:
                    request.listener(error.unpack())
            case LoadProgress(model=model):
                for load in self._loads.get(model, []):
                    if load.progress is not None:
                        load.progress(event)
            case ModelLoaded(model=model):
                self._loads[model].pop(0).future.set_result(event)
            case LoadFailed(model=model, error=error):
                if self._loads.get(model):  # a load that a request began may fail as the worker closes
                    self._loads[model].pop(0).future.set_exception(error.unpack())
            case Prefetched(model=model, error=error):
                future = self._prefetches[model].pop(0)
                if error is None:
                    future.set_result(event)
                else:
                    future.set_exception(error.unpack())
            case Stats():
                self.stats = event
            case _:
                pass  # what loads and leaves by itself interests nobody here

    def _deliver(self, delta: SequenceDelta) -> None:
        request = self._requests.get(delta.request_id)
        if request is None:
            return
        if delta.finish_reason is not None:
            request.num_open -= 1
            if request.num_open == 0:
                del self._requests[delta.request_id]
        request.listener(delta)

    def _fail_everything(self, error: FlashError) -> None:
        with self._lock:
            self._failure = error
            requests, self._requests = self._requests, {}
            loads, self._loads = self._loads, {}
            prefetches, self._prefetches = self._prefetches, {}
        for request in requests.values():
            request.listener(error)
        for load in itertools.chain.from_iterable(loads.values()):
            load.future.set_exception(error)
        for future in itertools.chain.from_iterable(prefetches.values()):
            future.set_exception(error)


def _describe(error: Exception) -> FlashError:
    """What callers are told of the end of the thread."""
    if isinstance(error, FlashError):
        return error
    _log.error("the worker thread failed", exc_info=error)
    return WorkerError(f"the worker failed: {type(error).__name__}: {error}")
