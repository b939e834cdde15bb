"""The daemon's process: `python -m flashtensors.server.daemon [--detach]`, settings as JSON on standard input.

One line on standard output says where it listens, or why it does not (`launch.StartReport`). The worker process is
started before the HTTP modules are even imported, because its own imports take longer than everything here.

SIGTERM or SIGINT drains: `/ready` turns 503 at once, new requests are refused with `Retry-After`, running ones get
`shutdown_timeout_s`. A second signal ends them now.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import os
import signal
import socket
import sys
import time

import msgspec

from ..config import Settings
from ..errors import FlashError
from .host_memory_file import open_host_memory_file
from .launch import DaemonInfo, StartReport, hold_daemon_lock, log_path, write_info
from .listener import bind
from .log_file import keep_log_bounded
from .metrics import Metrics
from .supervisor import Supervisor
from .worker_process import WorkerProcess

ABORT_TIMEOUT_S = 3.0
"""How long cut-off answers get to be told so."""

_log = logging.getLogger(__name__)


def main() -> int:
    """Run until a signal; returns the exit status."""
    if "--detach" in sys.argv and os.fork():
        os._exit(0)  # the starter reaps this process at once, and never has to wait for the daemon
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings.check_exposure()
        with hold_daemon_lock(settings.store), bind(settings.server_host, settings.server_port) as listener:
            asyncio.run(_serve(settings, listener))
    except FlashError as error:
        _log.error("%s", error.message)
        _report(StartReport(error=error.message))
        return 1
    except Exception as error:  # a bug: the starter shall hear of it too
        _log.exception("the daemon failed")
        _report(StartReport(error=f"{type(error).__name__}: {error}; see {log_path(settings.store)}"))
        return 1
    return 0


async def _serve(settings: Settings, listener: socket.socket) -> None:
    stop_requests = _StopRequests()
    metrics = Metrics()
    rotation = asyncio.create_task(keep_log_bounded(log_path(settings.store)), name="log rotation")
    with open_host_memory_file(settings) as host_pool_fd:
        supervisor = Supervisor(
            lambda: WorkerProcess.start(settings, host_pool_fd), metrics, timeout_s=settings.worker_timeout_s
        )
        await supervisor.start()
        try:
            await _serve_http(settings, listener, supervisor, metrics, stop_requests)
        finally:
            await supervisor.stop()
            rotation.cancel()


async def _serve_http(
    settings: Settings,
    listener: socket.socket,
    supervisor: Supervisor,
    metrics: Metrics,
    stop_requests: _StopRequests,
) -> None:
    # Imported here, while the worker process is starting already.
    from ..checkpoint.catalog import Catalog
    from .app import build_app
    from .context import ServerContext
    from .drain import Drain
    from .endpoint import MAX_HEADER_BYTES
    from .files import FileStore
    from .http_server import HttpServer
    from .models import ModelManager
    from .openai.batch_lines import make_batch_jobs
    from .pulls import Pulls

    catalog, drain = Catalog(settings.store), Drain()
    models = ModelManager(settings, catalog, supervisor, metrics)
    files = FileStore(settings.store / "files")
    batches = make_batch_jobs(settings, files, models, metrics)
    async with Pulls(catalog, settings) as pulls:
        app = build_app(
            ServerContext(
                settings=settings,
                models=models,
                metrics=metrics,
                pulls=pulls,
                drain=drain,
                files=files,
                batches=batches,
            )
        )
        async with HttpServer(app, listener, max_header_bytes=MAX_HEADER_BYTES):
            async with batches:  # left before draining: the next daemon goes on with what they have not done
                _announce(settings, listener)
                preload = asyncio.create_task(models.preload(), name="preload")
                await stop_requests.first.wait()
            preload.cancel()
            _log.info("draining: %d requests run", drain.num_running)
            drain.begin()
            finished = asyncio.create_task(drain.wait_idle(settings.shutdown_timeout_s))
            aborted = asyncio.create_task(stop_requests.second.wait())
            await asyncio.wait({finished, aborted}, return_when=asyncio.FIRST_COMPLETED)
            aborted.cancel()
            if drain.num_running:
                _log.warning("cutting off %d requests", drain.num_running)
                await supervisor.stop()  # every stream ends with an error of its own
                await drain.wait_idle(ABORT_TIMEOUT_S)
            finished.cancel()


def _announce(settings: Settings, listener: socket.socket) -> None:
    info = DaemonInfo(
        pid=os.getpid(),
        host=settings.server_host,
        port=listener.getsockname()[1],
        started_unix_s=time.time(),
        version=importlib.metadata.version("flashtensors"),
    )
    write_info(settings.store, info)
    _report(StartReport(info=info))
    _log.info("listening on %s, log in %s", info.url, log_path(settings.store))


def _report(report: StartReport) -> None:
    """Tell the starter, once; later prints would go to the log."""
    with contextlib.suppress(BrokenPipeError):  # the starter was stopped; nobody needs the line
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


class _StopRequests:
    """Signals as events: the first asks to drain, the second to stop now."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._notice)

    def _notice(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()


if __name__ == "__main__":
    sys.exit(main())
