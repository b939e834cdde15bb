"""Bringing models to host memory ahead of time, because a caller asked for it."""

from __future__ import annotations

from ..errors import BackendUnavailable, FileChanged, FlashError
from .actions import AnswerFill, Fill, StopFill
from .ledger import Ledger
from .profile import Profile, Work
from .resident import Phase


class Prefetches:
    """Callers who want models in host memory.

    A model on its way to the device brings its image along, so its load answers them too. The disk serves one fill
    after the other, in the order in which they were asked for: all at once, none would be there before the last.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._wanted: dict[str, Profile] = {}

    def want(self, ticket: int, profile: Profile) -> None:
        """A caller wants the model's image complete; the ticket is answered once."""
        profile.fill_tickets.append(ticket)
        self._wanted[profile.model] = profile

    def advance(self) -> None:
        """Start what can start and answer what is done."""
        for profile in list(self._wanted.values()):
            if profile.work is None and not self._is_coming(profile):
                self._advance(profile)

    def stop_fill(self, profile: Profile) -> None:
        """The model is wanted on the device: its load reads the rest."""
        if profile.work is Work.FILL and not profile.is_fill_stopped:
            profile.is_fill_stopped = True
            self._ledger.act(StopFill(profile.model))

    def answer(self, profile: Profile, error: FlashError | None = None) -> None:
        """Answer all who wait for the model."""
        self._wanted.pop(profile.model, None)
        host_bytes = 0 if error else self._ledger.host.held_bytes(profile.model)
        for ticket in profile.fill_tickets:
            self._ledger.act(AnswerFill(ticket, profile.model, host_bytes, error))
        profile.fill_tickets.clear()
        profile.was_replanned = False

    def fail(self, profile: Profile, error: FlashError) -> None:
        """What was done for the model failed: answer all who wait, or begin again once where its files changed."""
        if profile.fill_tickets and isinstance(error, FileChanged) and not profile.was_replanned:
            profile.was_replanned = True
        else:
            self.answer(profile, error)

    def _is_coming(self, profile: Profile) -> bool:
        resident = self._ledger.residents.get(profile.model)
        return resident is not None and resident.phase in (Phase.WANTED, Phase.QUEUED, Phase.MOVING)

    def _advance(self, profile: Profile) -> None:
        ledger = self._ledger
        if profile.demand is None:
            ledger.plan(profile)
        elif profile.image_bytes == 0 or ledger.host.capacity_bytes == 0:
            self.answer(
                profile,
                BackendUnavailable(
                    f"{profile.model} cannot be brought to a host tier: this device has none, because its models run "
                    "in host memory or mem_pool_size is 0; load it instead"
                ),
            )
        elif ledger.host.held_bytes(profile.model) >= profile.image_bytes:
            self.answer(profile)
        elif not any(each.work is Work.FILL for each in ledger.profiles.values()):
            profile.work = Work.FILL
            ledger.act(Fill(profile.model, ledger.grow_image(profile, is_forced=True)))
