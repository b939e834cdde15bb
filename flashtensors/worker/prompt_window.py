"""Very many requests on an embedded worker, of which only a window is in memory."""

from __future__ import annotations

import collections
import itertools
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
        num_running: Most that are at the worker.
        num_held: Most that are drawn and not yet yielded: what a slow first answer lets pile up behind it.
        on_delta: Called on this thread with a request and each delta that it has taken in, whosever turn it is.
    """
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    running: dict[str, OutputBuilder] = {}
    unread: collections.deque[OutputBuilder] = collections.deque()
    try:
        while True:
            room = min(num_running - len(running), num_held - len(unread))
            for builder in itertools.islice(builders, max(0, room)):
                running[builder.request.request_id] = builder
                unread.append(builder)
                worker.submit(builder.request, _listener(builder, events))
            if not unread:
                return
            if unread[0].is_finished:
                while unread and unread[0].is_finished:
                    yield unread.popleft().output()
                continue  # there is room for more
            _take(worker, events.get(), running, on_delta)
            while not events.empty():
                _take(worker, events.get(), running, on_delta)
    finally:
        for request_id in running:
            worker.abort(request_id)


def _take(worker: EmbeddedWorker, event: _Event, running: dict[str, OutputBuilder], on_delta: OnDelta | None) -> None:
    builder, what = event
    request_id = builder.request.request_id
    if request_id not in running:
        return  # computed before the engine heard of a stop string
    apply_event(worker, builder, what)
    if on_delta is not None and not isinstance(what, FlashError):
        on_delta(builder, what)
    if builder.is_finished:
        del running[request_id]


def _listener(builder: OutputBuilder, events: queue.SimpleQueue[_Event]) -> Listener:
    return lambda event: events.put((builder, event))
