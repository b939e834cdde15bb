"""Answers on the wire: error bodies in each protocol's shape, JSON, and streams that start late and end well."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Self

import msgspec
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ..errors import CapacityError, FlashError

COMMIT_AFTER_S = 5.0
"""How long a stream waits for its first item before it answers 200: until then a failure has a status of its own."""
HEARTBEAT_S = 5.0
"""Between signs of life while a committed stream has nothing to say."""
WRITE_STALL_S = 30.0
"""How long a client may leave a full socket unread before its stream is dropped."""
RETRY_AFTER_S = 1
"""What a 503 tells clients to wait."""

_log = logging.getLogger(__name__)

ErrorBody = Callable[[FlashError], bytes]


def openai_error_body(error: FlashError) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    kind = "server_error" if error.http_status >= 500 else "invalid_request_error"
    if error.http_status == 401:
        kind = "authentication_error"
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def ollama_error_body(error: FlashError) -> bytes:
    """`{"error": message}`, with the code beside it."""
    return msgspec.json.encode({"error": error.message, "code": error.code})


def internal_error(error: Exception) -> FlashError:
    """Log a bug with its traceback, and make what a client may know of it."""
    _log.error("internal error", exc_info=error)
    return FlashError("internal error; the daemon's log has the details")


def json_response(value: object, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: FlashError, body: ErrorBody) -> Response:
    """`error` with its status; 503 carries `Retry-After`."""
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.http_status == 503 else {}
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, CapacityError) and error.http_status == 503:
        headers["retry-after-ms"] = str(RETRY_AFTER_S * 1000)
    return Response(body(error), error.http_status, headers, media_type="application/json")


class Framing(msgspec.Struct, frozen=True, kw_only=True):
    """How items become bytes in a stream."""

    media_type: str
    prefix: bytes
    suffix: bytes
    heartbeat: bytes
    """Sent while there is nothing to say; empty: nothing is."""
    end: bytes
    """Sent after the last item of a stream without error."""
    error_body: ErrorBody


SSE = Framing(
    media_type="text/event-stream",
    prefix=b"data: ",
    suffix=b"\n\n",
    heartbeat=b": waiting\n\n",
    end=b"data: [DONE]\n\n",
    error_body=openai_error_body,
)
NDJSON = Framing(
    media_type="application/x-ndjson",
    prefix=b"",
    suffix=b"\n",
    heartbeat=b"",
    end=b"",
    error_body=ollama_error_body,
)


class StallGuard:
    """Ends a block with `TimeoutError` when a part of it, entered with `with`, takes too long.

    One timer for the whole block: a timeout for each part would cost more than the parts.

    Args:
        limit_s: Longest that a part may take; it may take a little longer.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._entered_s: float | None = None
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._timer is not None, "set on entry"
        self._timer.cancel()
        return await self._timeout.__aexit__(kind, error, traceback)

    def __enter__(self) -> None:
        self._entered_s = self._loop.time()

    def __exit__(self, *_: object) -> None:
        self._entered_s = None

    def _check(self) -> None:
        now_s = self._loop.time()
        if self._entered_s is not None and now_s - self._entered_s >= self._limit_s:
            self._timeout.reschedule(now_s)
        self._timer = self._loop.call_later(self._limit_s / 4, self._check)


class EventStream(Response):
    """Streams JSON items; a failure after the start becomes the last item.

    Created by `open_stream`, which owns the rule about when the status is decided.
    """

    def __init__(self, items: AsyncGenerator[object], first: asyncio.Task[object | None], framing: Framing) -> None:
        super().__init__(
            media_type=framing.media_type,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._items, self._first, self._framing = items, first, framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send head, items and end; closing early (cancellation, a stalled client) closes the source."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with StallGuard(WRITE_STALL_S) as guard, contextlib.aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    with guard:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            _log.warning("a client stopped reading its stream; dropped it")
        finally:
            await _close(self._items, self._first)

    async def _chunks(self) -> AsyncGenerator[bytes]:
        framing = self._framing
        try:
            while not self._first.done():
                await asyncio.wait({self._first}, timeout=HEARTBEAT_S)
                if not self._first.done() and framing.heartbeat:
                    yield framing.heartbeat
            if (first := self._first.result()) is not None:
                yield self._frames(first)
            async for item in self._items:
                yield self._frames(item)
            if framing.end:
                yield framing.end
        except FlashError as error:
            yield self._frame(framing.error_body(error))
        except Exception as error:  # the status is sent: only an item can tell
            yield self._frame(framing.error_body(internal_error(error)))

    def _frames(self, item: object) -> bytes:
        items = item if isinstance(item, list) else (item,)
        return b"".join([self._frame(msgspec.json.encode(one)) for one in items])

    def _frame(self, data: bytes) -> bytes:
        return self._framing.prefix + data + self._framing.suffix


class FileDownload(FileResponse):
    """A file's bytes; a client that stops reading them is dropped."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send head and bytes."""

        async def send_guarded(message: Message) -> None:
            with guard:
                await send(message)

        try:
            async with StallGuard(WRITE_STALL_S) as guard:
                await super().__call__(scope, receive, send_guarded)
        except TimeoutError:
            _log.warning("a client stopped reading a file; dropped it")


async def open_stream(items: AsyncGenerator[object], framing: Framing) -> EventStream:
    """A stream of `items` as JSON; waits up to `COMMIT_AFTER_S` for the first, so that early errors keep their status.

    An item that is a list is several, written at once: what a write costs is more than what a token does.

    Raises:
        FlashError: What `items` raised before its first item, in that time.
    """

    async def first_item() -> object | None:
        return await anext(items, None)

    first = asyncio.create_task(first_item())
    try:
        await asyncio.wait({first}, timeout=COMMIT_AFTER_S)
        if first.done() and isinstance(error := first.exception(), Exception):
            raise error
    except BaseException:
        await _close(items, first)
        raise
    return EventStream(items, first, framing)


async def _close(items: AsyncGenerator[object], first: asyncio.Task[object | None]) -> None:
    first.cancel()
    await asyncio.wait({first})
    await items.aclose()
