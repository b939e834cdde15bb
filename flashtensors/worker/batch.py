"""Runs requests on an embedded worker and builds their outputs on the caller's thread."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator

from ..errors import FlashError
from ..request import RequestOutput, SequenceDelta
from .embedded import EmbeddedWorker, Listener
from .outputs import OutputBuilder

_Event = SequenceDelta | FlashError


def apply_event(worker: EmbeddedWorker, builder: OutputBuilder, event: _Event) -> None:
    """Add what a request yielded to its outputs; raises it if it is an error."""
    if isinstance(event, FlashError):
        raise event
    if builder.push(event):
        worker.abort(builder.request.request_id, event.index, "stop")


def run_stream(worker: EmbeddedWorker, builder: OutputBuilder) -> Iterator[RequestOutput]:
    """Run one request, yielding all that is known after each step; closing the iterator aborts it."""
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    try:
        worker.submit(builder.request, events.put)
        while not builder.is_finished:
            apply_event(worker, builder, events.get())
            yield builder.output()
    finally:
        worker.abort(builder.request.request_id)


def run_batch(
    worker: EmbeddedWorker,
    builders: Iterator[OutputBuilder],
    *,
    window: int,
    on_output: Callable[[RequestOutput], None] | None = None,
) -> list[RequestOutput]:
    """Run many requests with at most `window` at the worker; outputs are in the order of the requests.

    The first error ends all that still run, and is raised.
    """
    events: queue.SimpleQueue[tuple[OutputBuilder, _Event]] = queue.SimpleQueue()
    running: dict[str, OutputBuilder] = {}
    outputs: dict[str, RequestOutput | None] = {}
    try:
        while True:
            for builder in itertools.islice(builders, window - len(running)):
                request = builder.request
                running[request.request_id], outputs[request.request_id] = builder, None
                worker.submit(request, _listener(builder, events))
            if not running:
                return [output for output in outputs.values() if output is not None]
            builder, event = events.get()
            request_id = builder.request.request_id
            if request_id not in running:
                continue  # computed before the engine heard of a stop string
            apply_event(worker, builder, event)
            if builder.is_finished:
                outputs[request_id] = output = running.pop(request_id).output()
                if on_output is not None:
                    on_output(output)
    finally:
        for request_id in running:
            worker.abort(request_id)


def _listener(builder: OutputBuilder, events: queue.SimpleQueue[tuple[OutputBuilder, _Event]]) -> Listener:
    return lambda event: events.put((builder, event))
