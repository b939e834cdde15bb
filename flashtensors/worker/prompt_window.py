"""Very many requests on an embedded worker, of which only a window is in memory."""

from __future__ import annotations

import collections
import queue
from collections.abc import Callable, Generator, Iterator

from ..errors import FlashError
from ..request import RequestOutput, SequenceDelta
from .batch import apply_event
from .embedded import EmbeddedWorker, Listener
from .outputs import OutputBuilder

OnDelta = Callable[[OutputBuilder, SequenceDelta], None]
"""Called with a request and a delta that it has taken in."""

_Event = tuple[OutputBuilder, SequenceDelta | FlashError]


def run_ordered(
    worker: EmbeddedWorker,
    builders: Iterator[OutputBuilder],
    *,
    num_running: int,
    num_held: int,
    on_delta: OnDelta | None = None,
) -> Generator[RequestOutput]:
    """Run requests as they are drawn from an iterator, and yield their outputs in the same order.

    The first error ends all that still run, and is raised; closing the generator ends them too.

    Args:
        worker: Runs them.
        builders: The requests; drawn from on this thread, when there is room.
        num_running: Answers at the worker, from which on no request is drawn. Up to `n - 1` more may come of the last.
        num_held: Likewise answers of requests that are not yet yielded: what a slow first one lets pile up behind it.
            One may be drawn behind it whatever its `n`, so that the worker need not run dry as it ends.
        on_delta: Called on this thread with a request and each delta that it has taken in, whosever turn it is.
    """
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    running: dict[str, OutputBuilder] = {}
    unread: collections.deque[OutputBuilder] = collections.deque()
    num_open = num_unread = 0
    try:
        while True:
            while num_open < num_running and (num_unread < num_held or len(unread) < 2):
                builder = next(builders, None)
                if builder is None:
                    break
                running[builder.request.request_id] = builder
                unread.append(builder)
                num_open += builder.num_open
                num_unread += builder.num_open
                worker.submit(builder.request, _listener(builder, events))
            if not unread:
                return
            if unread[0].is_finished:
                while unread and unread[0].is_finished:
                    num_unread -= unread[0].request.sampling.n
                    yield unread.popleft().output()
                continue  # there is room for more
            num_open -= _take(worker, events.get(), running, on_delta)
            while not events.empty():
                num_open -= _take(worker, events.get(), running, on_delta)
    finally:
        for request_id in running:
            worker.abort(request_id)


def _take(worker: EmbeddedWorker, event: _Event, running: dict[str, OutputBuilder], on_delta: OnDelta | None) -> int:
    """Take in what a request yielded; returns how many answers that ended."""
    builder, what = event
    request_id, num_open = builder.request.request_id, builder.num_open
    if request_id not in running:
        return 0  # computed before the engine heard of a stop string
    apply_event(worker, builder, what)
    if on_delta is not None and not isinstance(what, FlashError):
        on_delta(builder, what)
    if builder.is_finished:
        del running[request_id]
    return num_open - builder.num_open


def _listener(builder: OutputBuilder, events: queue.SimpleQueue[_Event]) -> Listener:
    return lambda event: events.put((builder, event))
