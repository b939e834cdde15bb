"""How many answers of batches are at the worker at once: its engine never runs dry, and its queue never fills up.

What the engine runs is not in its queue, but a request that was sent may not run yet. So some answers may always be in
flight, few enough to leave room in the queue if all of them waited. More are sent as the worker's reports say that few
wait: until as many do as keep the engine busy.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable

SETTLE_S = 0.5
"""Until a report counts what was sent: it is tokenised, travels and is taken in."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueueReport:
    """What a worker last said of the queue of a model on the device."""

    at_s: float
    """When it did, in Unix seconds."""
    num_waiting: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WindowLimits:
    """Numbers of answers."""

    num_sure: int
    """In flight for one model, whether they run or not. Also sent between two reports, beside half of what the engine
    took in between the two before: should it take in no more, they wait in its queue."""
    num_most: int
    """In flight for all models together."""
    num_spare: int
    """Waiting in an engine's queue: below this, more are sent."""


@dataclasses.dataclass(slots=True)
class _Flight:
    """The answers of one model."""

    settled_s: float
    """From when on a report counts those that were in flight when the last one was used."""
    num_in_flight: int = 0
    num_allowed: int = 0
    num_sent: int = 0
    """Since the last report was used."""
    num_waiting: int = 0
    """When the last report was used."""
    num_taken_in: int = 0
    """Between the last two."""


class Window:
    """Counts the answers in flight of one batch, and says when there is room for more.

    Args:
        limits: Their numbers.
        find_report: The latest report on a model; None: it is not on the device.
        clock: Unix seconds.
    """

    def __init__(
        self,
        limits: WindowLimits,
        find_report: Callable[[str], QueueReport | None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._limits, self._find_report, self._clock = limits, find_report, clock
        self._flights: defaultdict[str, _Flight] = defaultdict(lambda: _Flight(clock() + SETTLE_S))
        self._num_in_flight = 0

    def has_room(self, model: str, num_answers: int) -> bool:
        """Whether a request may be sent; one that asks for more than there ever is room for has to be alone."""
        if self._num_in_flight == 0:
            return True
        limits, flight = self._limits, self._flights[model]
        if self._num_in_flight + num_answers > limits.num_most:
            return False
        num_then = flight.num_in_flight + num_answers
        if num_then <= limits.num_sure:
            return True
        self._take_report(model, flight)
        num_sendable = limits.num_sure + flight.num_taken_in // 2 - flight.num_sent
        return num_then <= flight.num_allowed and num_answers <= num_sendable

    def take(self, model: str, num_answers: int) -> None:
        """Count a request that is sent."""
        flight = self._flights[model]
        flight.num_in_flight += num_answers
        flight.num_sent += num_answers
        self._num_in_flight += num_answers

    def give_back(self, model: str, num_answers: int) -> None:
        """Count a request that has its result."""
        self._flights[model].num_in_flight -= num_answers
        self._num_in_flight -= num_answers

    def _take_report(self, model: str, flight: _Flight) -> None:
        report = self._find_report(model)
        if report is None:
            flight.num_allowed = 0
        elif report.at_s >= flight.settled_s:
            flight.num_allowed = flight.num_in_flight + self._limits.num_spare - report.num_waiting
            flight.num_taken_in = max(0, flight.num_sent + flight.num_waiting - report.num_waiting)
            flight.num_sent, flight.num_waiting = 0, report.num_waiting
            flight.settled_s = self._clock() + SETTLE_S
