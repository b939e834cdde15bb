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
from typing import TypeVar

from ..errors import FlashError, WorkerError
from ..request import EngineRequest
from ..worker.messages import (
    Abort,
    Command,
    Deltas,
    Event,
    FirstToken,
    Forget,
    Generate,
    LoadModel,
    ModelLoaded,
    Prefetch,
    Prefetched,
    Register,
    RequestFailed,
    Shutdown,
    UnloadModel,
    WorkerReady,
)
from .mailbox import Mailbox
from .metrics import Metrics
from .pending import PendingAnswers
from .watchdog import Watchdog
from .worker_link import WorkerLink
from .worker_models import WorkerModels

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

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
        timeout_s: Silence after which a worker is replaced; None: by the device.
    """

    def __init__(
        self,
        open_link: Callable[[], Awaitable[WorkerLink]],
        metrics: Metrics,
        *,
        back_off_s: float = BACK_OFF_S,
        timeout_s: float | None = None,
    ) -> None:
        self._open_link = open_link
        self._metrics = metrics
        self._back_off_s = back_off_s
        self._timeout_s = timeout_s
        self._link: WorkerLink | None = None
        self._backlog: list[Command] = []
        self._task: asyncio.Task[None] | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._registered: dict[str, Register] = {}
        self._lasting: dict[str, LoadModel] = {}
        self.models = WorkerModels(metrics)
        """What the worker said of its models."""
        self.state = "starting"
        self.ready: WorkerReady | None = None
        """What the worker said of itself; None until it is ready."""
        self.load_waits: dict[str, float] = {}
        """Seconds that requests waited for their models, by id, until somebody forgets the request."""
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
        watching: asyncio.Task[None] | None = None
        try:
            link = self._link = self._link or await self._open_link()
            watchdog = Watchdog(link, self._timeout_s)
            watching = asyncio.create_task(watchdog.watch(), name="worker watchdog")
            backlog, self._backlog = self._backlog, []
            for command in [*self._registered.values(), *self._lasting.values(), *backlog]:
                link.send(command)
            return await self._follow(link, watchdog)
        except WorkerError as error:
            return error
        except Exception as error:  # a bug of ours, and the daemon must outlive it: a new worker is in a known state
            _log.exception("cannot follow the worker")
            return WorkerError(f"the worker was lost: {type(error).__name__}; it is started again")
        finally:
            if watching is not None:
                watching.cancel()

    async def _follow(self, link: WorkerLink, watchdog: Watchdog) -> WorkerError:
        """Route what the worker says until it is gone; returns why it is."""
        try:
            while True:
                event = await link.receive()
                watchdog.hear()
                if isinstance(event, WorkerReady):
                    watchdog.hear_ready(event.device)
                self._route(event)
        except WorkerError as error:
            return watchdog.error or error

    # ---------------------------------------------------------------- what the others ask

    def register(self, command: Register) -> None:
        """Let the worker, and every one after it, load a model by itself when a request asks for it."""
        self._registered[command.model] = command
        if self._link is not None:
            self._link.send(command)

    def forget_model(self, model: str) -> None:
        """A model's files have changed or are gone: nothing that was read of it is to be used again."""
        self._registered.pop(model, None)
        self._lasting.pop(model, None)
        self.send(Forget(model=model))

    def submit(self, request: EngineRequest, mailbox: Mailbox, keep_alive_s: float | None = None) -> None:
        """Run a request; its deltas, or its failure, arrive in `mailbox`.

        The worker brings a registered model to the device by itself; `keep_alive_s` says how long it stays then.
        """
        self._mailboxes[request.request_id] = mailbox
        self._send(Generate(request=request, keep_alive_s=keep_alive_s))

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        """Stop one answer, or all answers of a request; then nothing more of the request arrives."""
        if index is None:
            self.forget(request_id)
        self.send(Abort(request_id=request_id, index=index, finish_reason=finish_reason))

    def forget(self, request_id: str) -> None:
        """Stop routing a request whose answers are all complete."""
        self._mailboxes.pop(request_id, None)
        self.load_waits.pop(request_id, None)

    async def load(self, command: LoadModel) -> ModelLoaded:
        """Load a model; callers that ask while it loads share the one load, and may leave without ending it."""
        loaded = await self._ask(self.models.loads, command.model, command)
        if command.is_pinned:
            self._lasting[command.model] = command
        return loaded

    async def prefetch(self, model: str) -> Prefetched:
        """Bring a registered model into host memory; callers who ask meanwhile share the answer."""
        return await self._ask(self.models.prefetches, model, Prefetch(model=model))

    async def unload(self, model: str) -> None:
        """Drop a model once its running requests have ended, and wait for that."""
        self._lasting.pop(model, None)
        await self._ask(self.models.unloads, model, UnloadModel(model=model))

    async def _ask(self, pending: PendingAnswers[_Answer], model: str, command: Command) -> _Answer:
        future, is_new = pending.expect(model)
        if is_new:
            try:
                self._send(command)
            except FlashError:
                pending.forget(model)
                raise
        return await asyncio.shield(future)

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
            case Deltas(deltas=deltas, first_tokens=first_tokens):
                for first in first_tokens:
                    self._note_first_token(first)
                for delta in deltas:
                    mailbox = self._mailboxes.get(delta.request_id)
                    if mailbox is not None and not mailbox.put(delta):
                        self.abort(delta.request_id)
            case RequestFailed(request_id=request_id, error=error):
                mailbox = self._mailboxes.pop(request_id, None)
                self.load_waits.pop(request_id, None)
                if mailbox is not None:
                    mailbox.fail(error.unpack())
            case WorkerReady():
                self.ready, self.state = event, "ready"
                _log.info("worker %d is ready on %s (%s)", event.pid, event.device, event.device_name)
            case _:
                self.models.route(event)

    def _note_first_token(self, first: FirstToken) -> None:
        self._metrics.observe_first_token(first)
        if first.waited_s > 0 and first.request_id in self._mailboxes:
            self.load_waits[first.request_id] = first.waited_s

    def _fail_everything(self, error: WorkerError) -> None:
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(error)
        self._backlog = []
        self.load_waits, self.ready = {}, None
        self.models.lose_all(error)
