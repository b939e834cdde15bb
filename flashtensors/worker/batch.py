"""Runs requests on an embedded worker and builds their outputs on the caller's thread."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from ..errors import FlashError
from ..request import RequestOutput, SequenceDelta
from .embedded import EmbeddedWorker
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
