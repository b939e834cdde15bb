"""The state machine of where models are: on disk, in host memory, on the device. It decides; its owner does it.

    disk ──prefetch, load──▶ host memory ──▶ device             a model's bytes are copied up and never back

    ABSENT ──request, load──▶ LOADING ──ready──▶ READY ──unload, eviction, keep-alive──▶ UNLOADING ──dropped──▶ ABSENT
                                 │ failed ▶ ABSENT              who comes now waits for the model's next life ┘

Every method is one event: it takes the time, changes the state and returns the actions that follow. There is no clock,
thread or I/O in here, so tests drive it through any order of events.

A load first learns what the model demands (`planned`, once: plans are kept), then waits for room (`admission`), then
its bytes move. Requests start when it is `ready`: the runner waits for each layer; loads are answered when it has
`landed`. Any number of requests and loads share one life. A model that was loaded for a caller but has not served yet
is not evicted for `promise_s`. When a load fails, the models that left for it come back, as far as there is room.
"""

from __future__ import annotations

from ..errors import CapacityError, CheckpointError, FlashError
from .actions import Action, DropKept, Forget, ReportUnload
from .admission import Admission
from .device_room import DeviceRoom
from .host_room import HostRoom
from .ledger import Ledger
from .lives import Lives
from .prefetch import Prefetches
from .profile import Profile, Work
from .rates import Rates
from .resident import Phase, RequestTicket, Resident, WaitingLoad, WaitingRequest
from .tiers import Demand
from .view import ResidencyView


class Residency(ResidencyView):
    """Models of one device: where they are, their memory, leases, deadlines.

    Args:
        budget_bytes: Memory that weights and KV caches may take together.
        keep_alive_s: Seconds that an idle model stays; negative: for ever.
        host_bytes: Host memory for images; 0: there is no host tier.
        flexible_share: Share of the free memory beside its weights that one model's KV cache may take.
        kept_share: Share of the budget that KV caches of evicted models may take.
        promise_s: Seconds that a model waits for the first request after its load was answered.
        patience_s: See `Admission`.
        rates: What bringing a model back costs; None: guesses, until loads were observed.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        keep_alive_s: float,
        host_bytes: int = 0,
        flexible_share: float = 0.5,
        kept_share: float = 0.0,
        promise_s: float = 2.0,
        patience_s: float | None = None,
        rates: Rates | None = None,
    ) -> None:
        device = DeviceRoom(budget_bytes, flexible_share=flexible_share, kept_share=kept_share)
        super().__init__(Ledger(device, HostRoom(host_bytes), rates or Rates()))
        self._admission = Admission(self._ledger, patience_s)
        self._prefetches = Prefetches(self._ledger)
        self._lives = Lives(
            self._ledger, self._admission, self._prefetches, keep_alive_s=keep_alive_s, promise_s=promise_s
        )
        self._stale: dict[str, Profile] = {}

    def next_deadline_s(self) -> float | None:
        """When to call `tick` next; None when time changes nothing."""
        deadlines = [each.expires_at_s for each in self._residents.values()] + [self._admission.next_deadline_s()]
        return min((deadline_s for deadline_s in deadlines if deadline_s is not None), default=None)

    # Events from callers.

    def request(
        self, ticket: RequestTicket, model: str, now_s: float, *, keep_alive_s: float | None = None
    ) -> list[Action]:
        """A request for `model`: it is started now or as soon as the model is ready, or refused; exactly one of them.

        Args:
            ticket: Names the request.
            model: What it asks for.
            now_s: The time.
            keep_alive_s: How long the model stays when idle; None: as before.
        """
        resident = self._begin(model, now_s)
        resident.requests[ticket] = WaitingRequest(now_s, keep_alive_s)
        return self._settle(now_s)

    def give_up(self, ticket: RequestTicket, model: str, now_s: float) -> list[Action]:
        """A request that waits is no longer wanted; it is forgotten without an answer."""
        resident = self._residents[model]
        del resident.requests[ticket]
        if not resident.is_wanted and resident.phase in (Phase.WANTED, Phase.QUEUED):
            resident.leave("")
        return self._settle(now_s)

    def finish(self, model: str, now_s: float) -> list[Action]:
        """A request that was started has ended."""
        resident = self._residents[model]
        assert resident.num_leases > 0, f"{model}: lease returned twice"
        resident.num_leases -= 1
        resident.last_used_s = now_s
        return self._settle(now_s)

    def load(
        self, ticket: int, model: str, now_s: float, *, keep_alive_s: float | None = None, is_pinned: bool = False
    ) -> list[Action]:
        """A caller wants `model` on the device; the ticket is answered once."""
        resident = self._begin(model, now_s)
        was_loaded = resident.phase is Phase.READY and not resident.is_moving
        resident.loads.append(WaitingLoad(ticket, now_s, keep_alive_s, is_pinned))
        if was_loaded:
            self._ledger.now_s = now_s
            self._lives.answer_loads(resident, was_loaded=True)
        return self._settle(now_s)

    def prefetch(self, ticket: int, model: str, now_s: float) -> list[Action]:
        """A caller wants `model` in host memory; the ticket is answered once."""
        profile = self._ledger.profile(model)
        profile.popularity.count(now_s)
        self._prefetches.want(ticket, profile)
        return self._settle(now_s)

    def unload(self, ticket: int, model: str, now_s: float) -> list[Action]:
        """A caller wants `model` off the device; the ticket is answered once. Who still waits for it is refused."""
        resident = self._residents.get(model)
        if resident is None:
            self._ledger.act(ReportUnload(ticket, model, "not_loaded"))
            return self._settle(now_s)
        resident.unload_tickets.append(ticket)
        self._lives.refuse(resident, CapacityError(f"{model} was unloaded while it was loading; load it again"))
        if resident.phase is not Phase.LEAVING:
            resident.leave("unload")
        return self._settle(now_s)

    def forget(self, model: str, now_s: float) -> list[Action]:
        """The files of `model` have changed or are gone: its plan and image are dropped, a loaded one still serves."""
        profile = self._profiles.get(model)
        if profile is not None:
            self._stale[model] = profile
        return self._settle(now_s)

    def set_keep_alive(self, model: str, keep_alive_s: float, now_s: float) -> list[Action]:
        """Change how long idle `model` stays, counted from its last use; an absent model is ignored."""
        resident = self._residents.get(model)
        if resident is not None:
            resident.keep_alive_s = keep_alive_s
        return self._settle(now_s)

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        return self._settle(now_s)

    # Reports of the owner.

    def planned(self, model: str, demand: Demand, now_s: float, *, image_bytes: int = 0) -> list[Action]:
        """The model's files are sound; it demands this much, and its image in host memory takes `image_bytes`."""
        profile = self._end_work(model, Work.PLAN)
        profile.demand, profile.image_bytes = demand, image_bytes
        return self._settle(now_s)

    def ready(self, model: str, flexible_bytes: int, now_s: float) -> list[Action]:
        """Requests may start; the KV cache took `flexible_bytes` of what was reserved."""
        resident = self._residents[model]
        demand = resident.profile.demand
        assert demand is not None, "it was planned"
        resident.is_on_device, resident.flexible_bytes = True, flexible_bytes
        resident.last_used_s = now_s
        self.device.settle(model, demand.fixed_bytes + flexible_bytes)
        if resident.phase is Phase.MOVING:
            resident.phase = Phase.READY
        return self._settle(now_s)

    def landed(self, model: str, now_s: float, *, host_bytes: int = 0) -> list[Action]:
        """Every byte is on the device, and `host_bytes` of the image stay in host memory."""
        profile = self._end_work(model, Work.LOAD)
        self.host.settle(model, host_bytes)
        self._prefetches.answer(profile)
        resident = self._residents[model]
        resident.victims.clear()
        if resident.phase is Phase.READY:
            self._ledger.now_s = now_s
            self._lives.answer_loads(resident, was_loaded=False)
        return self._settle(now_s)

    def trimmed(self, model: str, host_bytes: int) -> None:
        """After `TrimHost`, `host_bytes` of the image stay: no more than was said."""
        self.host.settle(model, host_bytes)

    def adopt(self, model: str, host_bytes: int) -> None:
        """Host memory holds `host_bytes` of a model from before the machine began."""
        self._ledger.profile(model)
        self.host.settle(model, host_bytes)

    def filled(self, model: str, now_s: float, *, host_bytes: int) -> list[Action]:
        """The image has come as far as it may, or was stopped; `host_bytes` of it are there."""
        profile = self._end_work(model, Work.FILL)
        self.host.settle(model, host_bytes)
        if not profile.is_fill_stopped:
            self._prefetches.answer(profile)
        profile.is_fill_stopped = False
        return self._settle(now_s)

    def failed(self, model: str, error: FlashError, now_s: float, *, host_bytes: int = 0) -> list[Action]:
        """What the owner did for the model failed: a plan, a fill, or a load.

        A load that was not ready holds nothing any more. One that was is to be dropped, and the owner ends its
        requests with `error`. `host_bytes` of the image are there. A `CheckpointError` says that the files are not what
        the plan was made of: the plan and the image are dropped, so that the next load looks at the files again. After
        `FileChanged` those who wait are not answered yet: once for each of them the files are planned again.
        """
        profile = self._profiles[model]
        work, resident = profile.work, self._residents.get(model)
        assert work is not None, f"{model}: nothing could fail"
        self._end_work(model, work)
        profile.is_fill_stopped = False
        self.host.settle(model, host_bytes)
        if isinstance(error, CheckpointError) and work is not Work.PLAN:
            self._stale[model] = profile
        self._prefetches.fail(profile, error)
        if work is Work.LOAD and not self._residents[model].is_on_device:
            self.device.release(model)
        is_lost = resident is not None and (work is Work.LOAD or (work is Work.PLAN and resident.phase is Phase.WANTED))
        if resident is not None and is_lost:
            self._lives.fail(resident, error)
        return self._settle(now_s)

    def broken(self, model: str, error: FlashError, now_s: float) -> list[Action]:
        """What runs on the model cannot go on, and the owner ends it with `error`: the model leaves.

        Loads that wait for it to land get `error`; who waits for its next life goes on waiting.
        """
        resident = self._residents[model]
        if resident.phase is Phase.READY:
            self._lives.refuse(resident, error)
            resident.leave("failed")
        return self._settle(now_s)

    def dropped(self, model: str, now_s: float, *, kept_bytes: int = 0) -> list[Action]:
        """The model was dropped, but for `kept_bytes` of KV cache."""
        resident = self._residents[model]
        resident.is_on_device = False
        self.device.release(model, kept_bytes=kept_bytes)
        if kept_bytes and resident.is_outdated:  # its files have changed since it was told to keep them
            self._drop_kept(model)
        return self._settle(now_s)

    # Between the events.

    def _begin(self, model: str, now_s: float) -> Resident:
        """The life that somebody asks for now."""
        self._ledger.profile(model).popularity.count(now_s)
        return self._lives.find_or_begin(model)

    def _settle(self, now_s: float) -> list[Action]:
        """Draw all consequences of an event and hand over the actions."""
        self._ledger.now_s = now_s
        self._forget_stale()
        self._lives.advance()
        self._prefetches.advance()
        return self._ledger.take_actions()

    def _end_work(self, model: str, work: Work) -> Profile:
        profile = self._profiles[model]
        assert profile.work is work, f"{model}: {work} ended, but the owner was busy with {profile.work}"
        profile.work = None
        return profile

    def _drop_kept(self, model: str) -> None:
        self.device.drop_kept(model)
        self._ledger.act(DropKept(model))

    def _forget_stale(self) -> None:
        """Forget plans and images of files that have changed, unless something moves by them now."""
        for model in [model for model, profile in self._stale.items() if profile.work is None]:
            profile, resident = self._stale.pop(model), self._residents.get(model)
            profile.demand, profile.image_bytes = None, 0
            self.host.settle(model, 0)
            if self.device.kept_bytes(model):
                self._drop_kept(model)
            self._ledger.act(Forget(model))
            if resident is not None:
                resident.is_outdated = resident.is_on_device
                if resident.phase is Phase.QUEUED:
                    resident.phase = Phase.WANTED
            elif not profile.fill_tickets:
                del self._profiles[model]
