"""Keeps one worker process alive and routes what it says to those who wait for it.

    starting ── WorkerReady ──▶ ready ── process ends ──▶ starting (at once for the first crashes)
                                                       └▶ backing_off ── delay over ──▶ starting
    any ── stop() ──▶ stopped

When the worker dies, everything that waits for it fails with `WorkerError`; nothing is silently retried.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from ..errors import FlashError, WorkerError
from ..request import EngineRequest
from ..worker.messages import (
    Abort,
    Command,
    Deltas,
    Event,
    Generate,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    ModelUnloaded,
    RequestFailed,
    Shutdown,
    Stats,
    UnloadModel,
    WorkerReady,
)
from .mailbox import Mailbox
from .metrics import Metrics
from .worker_link import WorkerLink

_log = logging.getLogger(__name__)

CRASHES_BEFORE_BACK_OFF = 3
"""Crashes in a row that are answered by an immediate restart."""
BACK_OFF_S = 1.0
"""First delay after that; doubles up to `MAX_BACK_OFF_S`."""
MAX_BACK_OFF_S = 30.0
STABLE_AFTER_S = 60.0
"""A worker that lived this long wipes the count of crashes."""


class Supervisor:
    """One worker: its process, its loaded models, and the requests it runs.

    Args:
        open_link: Starts a worker process; called for the first start and for every restart.
        metrics: Where loads, unloads and reports are counted.
        back_off_s: First delay once crashes repeat.
    """

    def __init__(
        self, open_link: Callable[[], Awaitable[WorkerLink]], metrics: Metrics, *, back_off_s: float = BACK_OFF_S
    ) -> None:
        self._open_link = open_link
        self._metrics = metrics
        self._back_off_s = back_off_s
        self._link: WorkerLink | None = None
        self._backlog: list[Command] = []
        self._task: asyncio.Task[None] | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._loads: dict[str, asyncio.Future[ModelLoaded]] = {}
        self._unloads: dict[str, list[asyncio.Future[None]]] = {}
        self.state = "starting"
        self.ready: WorkerReady | None = None
        """What the worker said of itself; None until it is ready."""
        self.stats: Stats | None = None
        """The worker's latest report; an idle worker reports changes only."""
        self.stats_unix_s = 0.0
        """When that report came."""
        self.loaded: dict[str, ModelLoaded] = {}
        """Models on the device, by name."""
        self.progress: dict[str, LoadProgress] = {}
        """How far the loads that run have come, by name."""
        self.num_restarts = 0

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Start the worker process and the task that listens to it; raises `WorkerError` when none can be started."""
        self._link = await self._open_link()
        self._task = asyncio.create_task(self._keep_alive(), name="worker supervisor")

    async def stop(self) -> None:
        """Tell the worker to stop, fail what it still ran, and wait until its process is gone."""
        self.state = "stopped"
        if self._link is not None:
            self._link.send(Shutdown())
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        link, self._link = self._link, None
        if link is not None:
            await link.close()
        self._fail_everything(WorkerError("the daemon is stopping"))

    async def _keep_alive(self) -> None:
        num_crashes = 0
        while True:
            started_s = time.monotonic()
            error = await self._listen()
            num_crashes = 1 if time.monotonic() - started_s > STABLE_AFTER_S else num_crashes + 1
            _log.error("worker lost: %s", error)
            self.state = "starting"
            link, self._link = self._link, None
            self._fail_everything(error)
            if link is not None:
                await link.close()
            if num_crashes >= CRASHES_BEFORE_BACK_OFF:
                self.state = "backing_off"
                exponent = num_crashes - CRASHES_BEFORE_BACK_OFF
                await asyncio.sleep(min(MAX_BACK_OFF_S, self._back_off_s * 2**exponent))
                self.state = "starting"
            self.num_restarts += 1
            self._metrics.worker_restarts.inc()

    async def _listen(self) -> WorkerError:
        try:
            link = self._link = self._link or await self._open_link()
            backlog, self._backlog = self._backlog, []
            for command in backlog:
                link.send(command)
            while True:
                self._route(await link.receive())
        except WorkerError as error:
            return error
        except Exception as error:  # a bug of ours, and the daemon must outlive it: a new worker is in a known state
            _log.exception("cannot follow the worker")
            return WorkerError(f"the worker was lost: {type(error).__name__}; it is started again")

    # ---------------------------------------------------------------- what the others ask

    def submit(self, request: EngineRequest, mailbox: Mailbox) -> None:
        """Run a request; its deltas, or its failure, arrive in `mailbox`."""
        self._mailboxes[request.request_id] = mailbox
        self._send(Generate(request=request))

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        """Stop one answer, or all answers of a request; then nothing more of the request arrives."""
        if index is None:
            self._mailboxes.pop(request_id, None)
        self.send(Abort(request_id=request_id, index=index, finish_reason=finish_reason))

    def forget(self, request_id: str) -> None:
        """Stop routing a request whose answers are all complete."""
        self._mailboxes.pop(request_id, None)

    async def load(self, command: LoadModel) -> ModelLoaded:
        """Load a model; callers that ask while it loads share the one load, and may leave without ending it."""
        future = self._loads.get(command.model)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(_mark_seen)
            self._loads[command.model] = future
            try:
                self._send(command)
            except FlashError:
                del self._loads[command.model]
                raise
        return await asyncio.shield(future)

    async def unload(self, model: str) -> None:
        """Drop a model once its running requests have ended, and wait for that."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_mark_seen)
        self._send(UnloadModel(model=model))
        self._unloads.setdefault(model, []).append(future)
        await future

    def send(self, command: Command) -> None:
        """Send a command that has no answer of its own; without a worker it has no meaning and is dropped."""
        if self._link is not None:
            self._link.send(command)

    def _send(self, command: Command) -> None:
        if self.state in ("backing_off", "stopped"):
            why = "it crashed several times and is restarted soon" if self.state == "backing_off" else "it is stopping"
            raise WorkerError(f"the worker takes no work now: {why}; try again")
        if self._link is None:
            self._backlog.append(command)  # between two processes
        else:
            self._link.send(command)

    # ---------------------------------------------------------------- what the worker says

    def _route(self, event: Event) -> None:
        match event:
            case Deltas(deltas=deltas):
                for delta in deltas:
                    mailbox = self._mailboxes.get(delta.request_id)
                    if mailbox is not None and not mailbox.put(delta):
                        self.abort(delta.request_id)
            case RequestFailed(request_id=request_id, error=error):
                mailbox = self._mailboxes.pop(request_id, None)
                if mailbox is not None:
                    mailbox.fail(error.unpack())
            case Stats():
                self.stats, self.stats_unix_s = event, time.time()
                self._metrics.observe_stats(event)
            case WorkerReady():
                self.ready, self.state = event, "ready"
                _log.info("worker %d is ready on %s (%s)", event.pid, event.device, event.device_name)
            case _:
                self._route_load(event)

    def _route_load(self, event: Event) -> None:
        match event:
            case LoadProgress(model=model):
                self.progress[model] = event
            case ModelLoaded(model=model):
                self.loaded[model] = event
                self._metrics.observe_load(event)
                self._settle(model, event)
            case LoadFailed(model=model, error=wire):
                error = wire.unpack()
                self._metrics.load_failures.labels(model, error.code).inc()
                self._settle(model, error)
            case ModelUnloaded(model=model, reason=reason):
                if self.loaded.pop(model, None) is not None:
                    self._metrics.unloads.labels(model, reason).inc()
                    self._metrics.forget(model)
                for future in self._unloads.pop(model, []):
                    if not future.done():
                        future.set_result(None)

    def _settle(self, model: str, outcome: ModelLoaded | FlashError) -> None:
        self.progress.pop(model, None)
        future = self._loads.pop(model, None)
        if future is None or future.done():
            return
        if isinstance(outcome, FlashError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _fail_everything(self, error: WorkerError) -> None:
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(error)
        loads, self._loads = self._loads, {}
        unloads, self._unloads = self._unloads, {}
        for future in [*loads.values(), *(future for futures in unloads.values() for future in futures)]:
            if not future.done():
                future.set_exception(error)
        self._backlog = []
        self.loaded, self.progress, self.stats, self.ready = {}, {}, None, None
        self._metrics.forget_all()


def _mark_seen(future: asyncio.Future[ModelLoaded] | asyncio.Future[None]) -> None:
    """Read a failure even when all who waited have left, so that asyncio does not report it as lost."""
    if not future.cancelled():
        future.exception()
