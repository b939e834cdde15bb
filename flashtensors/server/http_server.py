"""uvicorn on a socket we own, started and stopped by us: signals and draining are the daemon's business."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import uvicorn
from starlette.types import ASGIApp

CLOSE_TIMEOUT_S = 2
"""How long connections get to close once nothing is left to answer."""
_POLL_S = 0.002


class HttpServer:
    """Serves an application inside an `async with` block.

    Args:
        app: What to serve.
        listener: A bound socket; closed on exit.
        max_header_bytes: Longest request line and headers; a longer one is answered with 400.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, *, max_header_bytes: int) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=max_header_bytes,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        self._server = _QuietServer(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]), name="http server")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(_POLL_S)
        if self._task.done():
            self._task.result()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None, "left without having been entered"
        self._server.should_exit = True
        await self._task


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signal handlers as they are."""
        yield
