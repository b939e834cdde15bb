"""The worker as a process of its own: `python -m flashtensors.worker.process --connect ipc://…`.

Its parent binds a ZeroMQ PAIR socket; one frame is one `Command` or `Event` in msgpack. Settings come as one line of
JSON on standard input, not as arguments or environment that others could read. Standard input then stays open: when
the parent dies, however it dies, the worker reads the end of it and leaves. SIGTERM ends it in order too.

`--host-pool-fd` names an inherited memory file for the host tier: what a worker read into it is there for the next.

The loop blocks without a timeout while there is nothing to do and no deadline; loading threads wake it through a pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import zmq

from ..config import Settings
from ..errors import FlashError
from .messages import Command, Event, RequestFailed, WireError, WorkerReady

if TYPE_CHECKING:
    from .host import Worker

_log = logging.getLogger(__name__)

LINGER_MS = 2000
"""How long the last events may take to reach the parent when the worker leaves."""


class Doorbell:
    """Wakes a loop that polls `fileno()`, from any thread and from signal handlers."""

    def __init__(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)

    def fileno(self) -> int:
        """Readable after a ring."""
        return self._read_fd

    def ring(self) -> None:
        """Wake the loop; many rings before it wakes are one."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake anyway
            os.write(self._write_fd, b"\0")

    def silence(self) -> None:
        """Take back all rings so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._read_fd, 4096):
                pass

    def close(self) -> None:
        """Give the pipe back; nobody may ring any more."""
        os.close(self._read_fd)
        os.close(self._write_fd)


class CommandLoop:
    """Carries commands and events between a socket and a worker until either end is done.

    Args:
        socket: Connected PAIR socket.
        parent_fd: Ends when the parent does.
        doorbell: Rung by signals and loading threads.
    """

    def __init__(self, socket: zmq.Socket[bytes], parent_fd: int, doorbell: Doorbell) -> None:
        self.should_stop = False
        self._socket = socket
        self._parent_fd = parent_fd
        self._doorbell = doorbell
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._poller = zmq.Poller()
        for source in (socket, parent_fd, doorbell.fileno()):
            self._poller.register(source, zmq.POLLIN)

    def emit(self, event: Event) -> None:
        """Send an event; never blocks."""
        self._socket.send(self._encoder.encode(event))

    def stop(self) -> None:
        """Make `run` return soon; safe in a signal handler."""
        self.should_stop = True
        self._doorbell.ring()

    def run(self, worker: Worker) -> None:
        """Obey and step until `stop`, a `Shutdown`, or the end of the parent."""
        is_busy = False
        while not (self.should_stop or worker.is_closed):
            self._wait(None if is_busy else worker.next_deadline(), is_busy=is_busy)
            for command in self._commands():
                worker.handle(command)
            if not worker.is_closed:
                is_busy = worker.step()

    def _wait(self, deadline_s: float | None, *, is_busy: bool) -> None:
        """Block until something happens; while busy, only look."""
        timeout_ms: int | None = 0
        if not is_busy:
            # Rounded up: a step just before the deadline would find nothing to do and wait again.
            timeout_ms = None if deadline_s is None else max(0, int((deadline_s - time.monotonic()) * 1000) + 1)
        ready = dict(self._poller.poll(timeout_ms))
        if self._doorbell.fileno() in ready:
            self._doorbell.silence()
        if self._parent_fd in ready and not os.read(self._parent_fd, 4096):
            _log.warning("the parent process is gone; leaving")
            self.should_stop = True

    def _commands(self) -> Iterator[Command]:
        """Take all commands that have arrived; frames that are none are logged and, where possible, answered."""
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                yield self._decoder.decode(frame)
            except (msgspec.DecodeError, FlashError, RecursionError) as error:
                _log.error("a frame of %d bytes is no command: %s", len(frame), error)
                request_id = _find_request_id(frame)
                if request_id is not None:
                    self.emit(RequestFailed(request_id=request_id, error=WireError.of(error)))


class _RequestId(msgspec.Struct):
    request_id: str


class _RequestEnvelope(msgspec.Struct):
    request: _RequestId


def _find_request_id(frame: bytes) -> str | None:
    """Id of the request in a frame whose other fields are wrong."""
    try:
        return msgspec.msgpack.decode(frame, type=_RequestEnvelope).request.request_id
    except (msgspec.DecodeError, RecursionError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker until its parent or a signal ends it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="flashtensors.worker.process", description="Worker of the flash daemon.")
    parser.add_argument("--connect", required=True, help="ZeroMQ endpoint that the parent has bound")
    parser.add_argument("--host-pool-fd", type=int, help="inherited memory file for models in host memory")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s worker %(levelname)s %(message)s")
    faulthandler.enable()  # of a fatal signal the log shows where each thread was
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for the parent
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the parent is gone already
    try:
        settings = msgspec.json.decode(line, type=Settings)
        _serve(parsed.connect, settings, parsed.host_pool_fd)
    except (FlashError, msgspec.DecodeError) as error:
        _log.error("the worker cannot run: %s", error)
        return 1
    return 0


def _serve(endpoint: str, settings: Settings, host_pool_fd: int | None) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set(zmq.LINGER, LINGER_MS)
        socket.set_hwm(0)  # the parent bounds what it lets wait; a worker that blocks would stall everybody
        socket.connect(endpoint)
        doorbell = Doorbell()
        loop = CommandLoop(socket, sys.stdin.fileno(), doorbell)

        def stop(signal_number: int, frame: FrameType | None) -> None:
            loop.stop()

        signal.signal(signal.SIGTERM, stop)
        from .host import Worker  # brings torch: seconds, so only now that signals and the socket are in place

        worker = Worker(settings, emit=loop.emit, wake=doorbell.ring, host_pool_fd=host_pool_fd)
        device = worker.device
        loop.emit(
            WorkerReady(
                pid=os.getpid(),
                device=device.name,
                device_name=device.description,
                total_bytes=device.budget_bytes,
                host_bytes=worker.host_bytes,
            )
        )
        try:
            loop.run(worker)
        finally:
            worker.close()


if __name__ == "__main__":
    sys.exit(main())
