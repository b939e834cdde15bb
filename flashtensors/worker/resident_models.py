"""The models of one device: carries out what the residency machine decides, and reports back to it."""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import assert_never

from ..errors import ConfigError, FlashError, ModelNotFound
from ..residency.actions import (
    Action,
    AdmitLoad,
    AnswerFill,
    AnswerLoad,
    Drop,
    DropKept,
    Fill,
    Forget,
    RefuseRequest,
    ReportUnload,
    StartPlan,
    StartRequest,
    StopFill,
    TrimHost,
)
from ..residency.machine import Residency
from ..residency.tiers import State
from .background import BackgroundLoads, DropFailed, Dropped, Failed, Filled, Landed, Planned, Ready, Report
from .known_models import KnownModels
from .load_ends import LoadEnds
from .load_records import LoadRecords
from .loading import Grant, KeptKv, LoadedModel, PlannedModel
from .messages import Event, LoadFailed, LoadModel, LoadProgress, Prefetched, Register, WireError
from .ports import Images, RequestHome


class ResidentModels:
    """Loads, drops and counts models; emits an event for each change.

    Args:
        residency: Decides.
        loads: Plans and reads in threads.
        images: Models in host memory; what they hold from before is taken over.
        requests: Who is told when requests may start.
        emit: Called with every event.
        clock: Seconds.
    """

    def __init__(
        self,
        residency: Residency,
        loads: BackgroundLoads,
        images: Images,
        requests: RequestHome,
        *,
        emit: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.residency = residency
        """What is where, to be read."""
        self.loaded: dict[str, LoadedModel] = {}
        """Models on the device, by name; those that leave but still run requests among them."""
        self.broken: set[str] = set()
        """Of those, the ones that must not step any more."""
        self._landing: set[str] = set()  # of those, the ones whose weights are still on their way
        self.num_changes = 0
        """Counts up with everything that changes what is loaded."""
        self._loads = loads
        self._images = images
        self._requests = requests
        self._emit = emit
        self._clock = clock
        self._tickets = itertools.count()
        self._known = KnownModels()
        self._planned: dict[str, PlannedModel] = {}
        self._kept: dict[str, KeptKv] = {}
        self._records = LoadRecords(residency.rates)
        self._ends = LoadEnds(loads.cancel, emit)
        self._pending: deque[Action] = deque()
        self._due_s: float | None = None  # not known since the last event
        for model in images.names():
            residency.adopt(model, images.held_bytes(model))

    # What callers ask.

    def register(self, command: Register | LoadModel) -> None:
        """Know a model; one that is known under other values is forgotten first."""
        self._loads.expect(command)
        if self._known.register(command):
            self._perform(self.residency.forget(command.model, self._clock()))

    def forget(self, model: str) -> None:
        """The model's files have changed or are gone."""
        if self.state(model) not in (State.LOADING, State.UNLOADING):  # others may have a next life
            self._known.forget(model)
        self._perform(self.residency.forget(model, self._clock()))

    def load(self, command: LoadModel) -> None:
        """Make a model ready; answered by an event."""
        model = command.model
        try:
            if model not in self._known or self.state(model) in (State.ABSENT, State.UNLOADING):
                self.register(command)
            self._known.check(command)
        except ConfigError as error:
            self._emit(LoadFailed(model=model, error=WireError.of(error)))
            return
        keep_alive_s, is_pinned = command.keep_alive_s, command.is_pinned
        ticket, now_s = next(self._tickets), self._clock()
        self._perform(self.residency.load(ticket, model, now_s, keep_alive_s=keep_alive_s, is_pinned=is_pinned))

    def prefetch(self, model: str) -> None:
        """Bring a registered model into host memory; answered by an event."""
        try:
            self.check_known(model)
            self._perform(self.residency.prefetch(next(self._tickets), model, self._clock()))
        except ModelNotFound as error:
            self._emit(Prefetched(model=model, error=WireError.of(error)))

    def unload(self, model: str) -> None:
        """Drop a model once its requests have ended; answered by an event. A load that runs is cancelled then."""
        self._ends.unload(model)
        self._perform(self.residency.unload(next(self._tickets), model, self._clock()), explained=model)

    def fail(self, model: str, error: FlashError) -> None:
        """Drop a model whose state is broken, once its leases are returned; loads that wait for it get `error`."""
        if model in self.loaded:
            self.broken.add(model)
            self._perform(self.residency.broken(model, error, self._clock()), explained=model)

    def set_keep_alive(self, model: str, keep_alive_s: float) -> None:
        """Change how long a model stays when idle; ignored where it is not there."""
        self._perform(self.residency.set_keep_alive(model, keep_alive_s, self._clock()))

    def state(self, model: str) -> State:
        """How far a model is."""
        return self.residency.state(model)

    def check_known(self, model: str) -> None:
        """Raise `ModelNotFound` for a model that was never registered or loaded."""
        self._known.get(model)

    def request(self, request_id: str, model: str, keep_alive_s: float | None) -> None:
        """A request for a known model: it is started or refused, now or once."""
        self._perform(self.residency.request(request_id, model, self._clock(), keep_alive_s=keep_alive_s))

    def give_up(self, request_id: str, model: str) -> None:
        """A request that waits is not wanted any more."""
        self._perform(self.residency.give_up(request_id, model, self._clock()))

    def release(self, model: str) -> None:
        """A request that was started has ended."""
        self._ends.end_request(model)
        self._perform(self.residency.finish(model, self._clock()))

    def working(self) -> list[tuple[str, LoadedModel]]:
        """Sound models whose engines have work.

        Steps of all models run in one order on the device, so one that waits there for its weights would hold up all
        others: while any of those has work, it comes when it has landed.
        """
        models = self.loaded.items()
        busy = [(model, loaded) for model, loaded in models if loaded.engine.has_work and model not in self.broken]
        return [(model, loaded) for model, loaded in busy if model not in self._landing] or busy

    def next_deadline(self) -> float | None:
        """When `advance` must be called though nothing happens."""
        return self.residency.next_deadline_s()

    def advance(self) -> None:
        """Take in what threads report and what time brings."""
        for report in self._loads.reports():
            self._take_report(report)
        now_s = self._clock()
        if self._due_s is None:
            due_s = self.next_deadline()
            self._due_s = math.inf if due_s is None else due_s
        if now_s >= self._due_s:
            self._perform(self.residency.tick(now_s))

    def close(self, error: FlashError) -> None:
        """Fail loads that run, wait for their threads, and give all memory back."""
        self._loads.cancel_all()
        for model in self.residency.models_in(State.LOADING):
            self._emit(LoadFailed(model=model, error=WireError.of(error)))
        self._loads.join()
        for report in self._loads.reports():
            if isinstance(report, Ready):
                self.loaded[report.model] = report.loaded
            elif isinstance(report, Dropped) and report.kept is not None:
                self._kept[report.model] = report.kept
        for held in (self.loaded, self._kept):
            while held:
                held.popitem()[1].close()

    # What the machine decides.

    def _perform(self, actions: list[Action], *, explained: str | None = None) -> None:
        """Carry out actions in order, and after them those that follow from them; for `explained` see `LoadEnds`."""
        self._ends.note_refusals(actions, explained=explained)
        is_performing = bool(self._pending)  # what is carried out stays in there until it is done
        self._pending.extend(actions)
        self._due_s = None
        while self._pending and not is_performing:
            self._perform_one(self._pending[0])
            self._pending.popleft()

    def _perform_one(self, action: Action) -> None:
        match action:
            case StartRequest(ticket=request_id, model=model):
                self._ends.start_request(model)
                self._requests.start_request(request_id, self.loaded[model])
            case RefuseRequest(ticket=request_id):
                self._requests.refuse_request(request_id, action.error)
            case StartPlan(model=model):
                self._loads.start_plan(model, functools.partial(self._known.get, model))
            case AdmitLoad():
                self._admit(action)
            case Fill(model=model):
                self._loads.start_fill(model, self._planned[model], action.host_bytes)
            case StopFill(model=model):
                self._loads.cancel(model)
            case TrimHost(model=model, keep_bytes=keep_bytes):
                self.residency.trimmed(model, self._images.trim(model, keep_bytes))
            case Forget(model=model):
                self._planned.pop(model, None)
                self._images.drop(model)
            case Drop(model=model, keeps_kv=keeps_kv):
                is_broken = model in self.broken
                self.broken.discard(model)
                self._loads.start_drop(model, self.loaded.pop(model), keeps_kv=keeps_kv, is_broken=is_broken)
            case DropKept(model=model):
                self._kept.pop(model).close()
            case AnswerLoad() | AnswerFill() | ReportUnload():
                self._emit(self._records.answer(action, self.loaded, self.residency.image_bytes(action.model)))
            case _:
                assert_never(action)
        self.num_changes += not isinstance(action, StartRequest)

    def _admit(self, action: AdmitLoad) -> None:
        kept = self._kept.pop(action.model) if action.uses_kept_kv else None
        grant = Grant(kv_bytes=action.flexible_bytes, host_bytes=action.host_bytes, kept=kept)
        self._records.begin(action)
        self._ends.begin(action.model)
        self._loads.start_load(action.model, self._planned[action.model], grant)

    # What threads report.

    def _take_report(self, report: Report) -> None:
        match report:
            case Planned(model=model, planned=planned, seconds=seconds):
                self._planned[model] = planned
                self._records.note_plan(model, seconds)
                self.residency.trimmed(model, self._images.held_bytes(model))  # those of other files are gone
                now_s, image_bytes = self._clock(), planned.host_bytes
                self._perform(self.residency.planned(model, planned.demand, now_s, image_bytes=image_bytes))
            case Ready(model=model, loaded=loaded):
                self.loaded[model] = loaded
                self._landing.add(model)
                self._emit(self._records.ready(model, loaded))
                self._perform(self.residency.ready(model, loaded.kv_cache_bytes, self._clock()))
            case Landed(model=model, stats=stats):
                self._landing.remove(model)
                self._ends.land(model)
                host_bytes = self._images.held_bytes(model)
                self._emit(self._records.landed(model, stats, host_bytes))
                self._perform(self.residency.landed(model, self._clock(), host_bytes=host_bytes))
            case Filled(model=model):
                self._perform(self.residency.filled(model, self._clock(), host_bytes=self._images.held_bytes(model)))
            case Dropped(model=model, kept=kept):
                self._take_dropped(model, kept)
            case DropFailed(error=error):
                raise error
            case Failed(model=model, error=error):
                self._fail_work(model, error)
            case LoadProgress():
                self._emit(report)
            case _:
                assert_never(report)

    def _take_dropped(self, model: str, kept: KeptKv | None) -> None:
        if kept is not None:
            self._kept[model] = kept
        kept_bytes = 0 if kept is None else kept.num_bytes
        self._perform(self.residency.dropped(model, self._clock(), kept_bytes=kept_bytes))

    def _fail_work(self, model: str, error: FlashError) -> None:
        self._landing.discard(model)
        host_bytes = self._images.held_bytes(model)
        was_loading = self._records.fail(model)
        actions = self.residency.failed(model, error, self._clock(), host_bytes=host_bytes)
        if was_loading and self.state(model) is not State.LOADING:  # else it begins again
            self._ends.fail(model, error)
        self._perform(actions, explained=model if was_loading else None)
        if was_loading and model in self.loaded:
            self.broken.add(model)
            self._requests.fail_requests(model, error)
