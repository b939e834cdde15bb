"""Lives of models on the device: how each begins, whom it answers, and how it ends."""

from __future__ import annotations

import math

from ..errors import FileChanged, FlashError
from .actions import AnswerLoad, Drop, RefuseRequest, ReportUnload, StartRequest
from .admission import Admission
from .ledger import Ledger
from .prefetch import Prefetches
from .profile import Work
from .resident import Phase, Resident


class Lives:
    """Begins, advances and ends residents.

    Args:
        ledger: The books.
        admission: Who comes to the device.
        prefetches: Fills that a load must wait for.
        keep_alive_s: Of a life for which nobody says otherwise.
        promise_s: How long a model waits for its first request after a load was answered.
    """

    def __init__(
        self, ledger: Ledger, admission: Admission, prefetches: Prefetches, *, keep_alive_s: float, promise_s: float
    ) -> None:
        self._ledger = ledger
        self._admission = admission
        self._prefetches = prefetches
        self._keep_alive_s = keep_alive_s
        self._promise_s = promise_s

    def find_or_begin(self, model: str) -> Resident:
        """The life of `model`, a new one where there is none."""
        resident = self._ledger.residents.get(model)
        if resident is None:
            resident = Resident(model, self._ledger.profile(model), self._keep_alive_s)
            self._ledger.residents[model] = resident
        return resident

    def advance(self) -> None:
        """Draw all consequences of an event."""
        self._start_requests()
        self._expire()
        self._bury()
        self._bring_in()
        for resident, error in self._admission.serve():
            self.refuse(resident, error)
            resident.leave("")
        self._bury()
        self._drop()

    def _expire(self) -> None:
        now_s = self._ledger.now_s
        for resident in self._ledger.residents.values():
            expires_at_s = resident.expires_at_s
            if expires_at_s is not None and now_s >= expires_at_s:
                resident.leave("keep_alive")

    def _bury(self) -> None:
        """End the lives of which nothing is left, and begin the next where somebody waits for it."""
        for resident in list(self._ledger.residents.values()):
            if resident.phase is Phase.LEAVING and not resident.is_on_device and not resident.is_moving:
                self.end(resident)

    def _bring_in(self) -> None:
        """Have wanted models planned, and put those with a plan into the queue."""
        for resident in self._ledger.residents.values():
            if resident.phase is not Phase.WANTED:
                continue
            profile = resident.profile
            if profile.work is Work.FILL:
                self._prefetches.stop_fill(profile)
            elif profile.work is None and profile.demand is None:
                self._ledger.plan(profile)
            elif profile.work is None:
                resident.phase = Phase.QUEUED

    def _drop(self) -> None:
        for resident in self._ledger.residents.values():
            is_done = resident.phase is Phase.LEAVING and not resident.num_leases and not resident.is_moving
            if is_done and not resident.is_dropping:
                resident.is_dropping, resident.keeps_kv = True, self._admission.keeps_kv(resident)
                self._ledger.act(Drop(resident.model, resident.keeps_kv))

    def _start_requests(self) -> None:
        for resident in self._ledger.residents.values():
            if resident.phase is Phase.READY and resident.requests:
                for ticket, waiting in resident.requests.items():
                    if waiting.keep_alive_s is not None:
                        resident.keep_alive_s = waiting.keep_alive_s
                    self._ledger.act(StartRequest(ticket, resident.model))
                resident.num_leases += len(resident.requests)
                resident.last_used_s = resident.promised_until_s = self._ledger.now_s
                resident.requests.clear()

    # Answers and ends.

    def answer_loads(self, resident: Resident, *, was_loaded: bool) -> None:
        """The model is there: answer those who asked for it, and keep it for their requests."""
        if not resident.loads:
            return
        for load in resident.loads:
            resident.is_pinned = resident.is_pinned or load.is_pinned
            if load.keep_alive_s is not None:
                resident.keep_alive_s = load.keep_alive_s
            self._ledger.act(AnswerLoad(load.ticket, resident.model, was_loaded))
            was_loaded = True
        resident.loads.clear()
        resident.last_used_s = self._ledger.now_s
        if resident.promised_until_s == -math.inf:  # else whoever loads it again and again would keep others waiting
            resident.promised_until_s = self._ledger.now_s + self._promise_s

    def refuse(self, resident: Resident, error: FlashError) -> None:
        """Answer all who wait with `error`."""
        for load in resident.loads:
            self._ledger.act(AnswerLoad(load.ticket, resident.model, error=error))
        for ticket in resident.requests:
            self._ledger.act(RefuseRequest(ticket, resident.model, error))
        resident.loads.clear()
        resident.requests.clear()

    def fail(self, resident: Resident, error: FlashError) -> None:
        """Its plan or its load failed: answer all who wait, or begin again once where its files changed."""
        if resident.phase is Phase.LEAVING:
            resident.has_failed = resident.reason != "unload"
            return
        is_stale = resident.phase is Phase.MOVING and isinstance(error, FileChanged)
        if is_stale and resident.is_wanted and not resident.was_replanned:
            resident.phase, resident.was_replanned = Phase.WANTED, True
            return
        self.refuse(resident, error)
        resident.has_failed = True
        resident.leave("failed" if resident.is_on_device else "")

    def end(self, resident: Resident) -> None:
        """Report that the model has left, and begin the next lives: its own where somebody waits for one, and those
        of its victims where it never came."""
        model, tickets = resident.model, resident.unload_tickets
        del self._ledger.residents[model]
        for position, ticket in enumerate(tickets or ([None] if resident.reason else [])):
            reason = resident.reason if position == 0 and resident.reason else "not_loaded"
            self._ledger.act(ReportUnload(ticket, model, reason))
        if resident.is_wanted:
            following = self.find_or_begin(model)
            following.loads, following.requests = resident.loads, resident.requests
        for victim in resident.victims if resident.has_failed else []:
            if victim.model not in self._ledger.residents:
                self.find_or_begin(victim.model).keep_alive_s = victim.keep_alive_s
