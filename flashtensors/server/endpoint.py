"""The one door of every route: authentication, host, size and type of the body, draining, disconnects, errors.

The checks sit on the routed endpoint, not on a path prefix, so that no spelling of a path goes around them. A route is
closed unless it is built with `is_public=True`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..config import Settings
from ..errors import AuthenticationError, FlashError, RequestError
from .bodies import MAX_BODY_BYTES
from .context import Call, ServerContext
from .responses import ErrorBody, error_response, internal_error
from .uploads import Upload, body_chunks, read_upload

MAX_HEADER_BYTES = 32 * 1024
"""Longest headers, taken together."""
BODY_TIMEOUT_S = 30.0
"""How long a client may take to send its body."""

_log = logging.getLogger("flashtensors.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

Handler = Callable[[Call], Awaitable[Response]]


class Endpoint:
    """An ASGI application around one handler.

    Args:
        handler: Turns a `Call` into a response, or raises a `FlashError`.
        server: What the handler works with.
        error_body: The shape of errors on this route.
        is_public: Whether the route answers without a key; only for the constant-cost health routes.
        takes_upload: Whether the body is a form with a file, which is written to disk as it comes.
        needs_body: Whether a POST without body and type is refused, such as a page of another site can send. Where it
            is not, the path has to hold what nobody guesses.
    """

    def __init__(
        self,
        handler: Handler,
        server: ServerContext,
        error_body: ErrorBody,
        *,
        is_public: bool = False,
        takes_upload: bool = False,
        needs_body: bool = True,
    ) -> None:
        self._handler, self._server, self._error_body = handler, server, error_body
        self.is_public, self._takes_upload, self._needs_body = is_public, takes_upload, needs_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; a client that leaves cancels the handler."""
        request = Request(scope)
        given_id = request.headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        log = _AccessLog(request, request_id, send)
        try:
            check_access(request, self._server.settings, is_public=self.is_public)
            async with contextlib.AsyncExitStack() as held:
                if self._takes_upload:
                    check_content_type(request, "multipart/form-data")
                    body, upload = b"", await held.enter_async_context(self._read_upload(request, receive))
                else:
                    body, upload = await self._read_json(request, receive), None
                if not self.is_public:
                    held.enter_context(self._server.drain.admit())
                call = Call(
                    server=self._server,
                    request_id=request_id,
                    body=body,
                    path_params=request.path_params,
                    query_params=request.query_params,
                    upload=upload,
                )
                await _run_until_disconnect(self._answer(call, scope, receive, log.send), receive)
        except FlashError as error:
            await error_response(error, self._error_body)(scope, receive, log.send)
        finally:
            log.write()

    async def _read_json(self, request: Request, receive: Receive) -> bytes:
        if request.method == "POST" and (self._needs_body or "content-type" in request.headers):
            check_content_type(request, "application/json")
        body = await _read_body(request, receive)
        if request.method == "POST" and body:
            check_content_type(request, "application/json")
        return body

    def _read_upload(self, request: Request, receive: Receive) -> contextlib.AbstractAsyncContextManager[Upload]:
        chunks = body_chunks(receive)
        return read_upload(chunks, request.headers.get("content-type", ""), self._server.files.new_partial())

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handler(call)
        except FlashError as error:
            response = error_response(error, self._error_body)
        except Exception as error:  # the boundary: a bug becomes a 500 that leaks nothing
            response = error_response(internal_error(error), self._error_body)
        await response(scope, receive, send)


def check_access(request: Request, settings: Settings, *, is_public: bool) -> None:
    """Check the headers' size, Host and key.

    Raises:
        RequestError: Headers too long, or a Host that a page of another site could have sent.
        AuthenticationError: A missing or wrong key.
    """
    if sum(len(name) + len(value) for name, value in request.headers.raw) > MAX_HEADER_BYTES:
        raise RequestError(f"the headers are longer than {MAX_HEADER_BYTES} bytes; send less")
    if settings.is_loopback:
        _check_host(request.headers.get("host", ""), settings)
    if not is_public and settings.api_key is not None:
        expected = f"Bearer {settings.api_key}".encode()
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(expected, given):
            raise AuthenticationError("the API key is missing or wrong; send 'Authorization: Bearer <key>'")


def check_content_type(request: Request, wanted: str) -> None:
    """Raise `RequestError` when the body is of another type, such as a form of another site's page can send."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != wanted:
        raise RequestError(f"content-type is {content_type[:100]!r}, but it must be {wanted}", param="content-type")


def _check_host(header: str, settings: Settings) -> None:
    name = header.rpartition(":")[0] if re.search(r":\d+$", header) else header
    if name.strip("[]").lower() not in _LOCAL_NAMES | {settings.server_host}:
        raise RequestError(
            f"this daemon answers to localhost only, not to host {header[:100]!r}; set server_host to serve others",
            param="host",
        )


async def _read_body(request: Request, receive: Receive) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError("the client left before its body was read")
                chunks.append(message.get("body", b""))
                num_bytes += len(chunks[-1])
                if num_bytes > MAX_BODY_BYTES:
                    raise _too_large()
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError as error:
        raise RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from error


def _too_large() -> RequestError:
    return RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes; send less")


async def _run_until_disconnect(answer: Awaitable[None], receive: Receive) -> None:
    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    work, watcher = asyncio.ensure_future(answer), asyncio.create_task(watch())
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        unfinished = [task for task in (work, watcher) if not task.done()]
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
    if not work.cancelled():
        work.result()


class _AccessLog:
    """Stamps answers with the request id, and writes one line when a request has ended; never its content."""

    def __init__(self, request: Request, request_id: str, send: Send) -> None:
        self._request, self._request_id, self._send = request, request_id, send
        self._started_s = time.monotonic()
        self._status = 499  # the client left before an answer
        self._num_bytes = 0

    async def send(self, message: Message) -> None:
        """Pass a message on to the client."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._request_id.encode())]
        self._num_bytes += len(message.get("body", b""))
        await self._send(message)

    def write(self) -> None:
        """Write the line."""
        seconds = time.monotonic() - self._started_s
        path = self._request.url.path
        _log.info(
            "%s %r %d %d bytes %.3f s %s",
            self._request.method, path, self._status, self._num_bytes, seconds, self._request_id,
        )  # fmt: skip
