"""A worker process and the socket to it.

The worker connects to a ZeroMQ socket of this process, in a folder that only this user can enter. It gets its settings
as one line on standard input, which stays open: when the daemon dies, however it dies, the worker reads the end of it
and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process

import msgspec
import zmq
import zmq.asyncio

from ..config import Settings
from ..errors import WorkerError
from ..worker.messages import Command, Event

LEAVE_TIMEOUT_S = 5.0
"""How long a worker that was told to stop may take before it is killed."""


class WorkerProcess:
    """One start of a worker; a `WorkerLink`. Made by `start`."""

    def __init__(
        self,
        process: Process,
        socket: zmq.asyncio.Socket,
        resources: contextlib.ExitStack,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self._process, self._socket, self._resources, self._folder = process, socket, resources, folder
        self._has_spoken = False
        self._exit = asyncio.create_task(process.wait(), name="worker exit")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)

    @classmethod
    async def start(cls, settings: Settings, host_pool_fd: int | None = None) -> WorkerProcess:
        """Start a worker; it says `WorkerReady` when it is.

        Args:
            settings: Its settings.
            host_pool_fd: A memory file that it inherits for models in host memory; it finds there what the worker
                before it read.

        Raises:
            WorkerError: No process can be started.
        """
        with contextlib.ExitStack() as stack:
            folder = tempfile.TemporaryDirectory(prefix="flash-")
            stack.enter_context(folder)
            context = stack.enter_context(zmq.asyncio.Context())
            socket = stack.enter_context(context.socket(zmq.PAIR))
            socket.set(zmq.LINGER, 0)
            socket.set_hwm(0)  # the queue of each request is bounded where requests are admitted
            endpoint = f"ipc://{folder.name}/worker"
            command = [sys.executable, "-m", "flashtensors.worker.process", "--connect", endpoint]
            inherited = () if host_pool_fd is None else (host_pool_fd,)
            command += [f"--host-pool-fd={fd}" for fd in inherited]
            try:
                socket.bind(endpoint)
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=PIPE, stdout=sys.stderr, pass_fds=inherited
                )
            except (OSError, zmq.ZMQError) as error:
                raise WorkerError(f"the worker process could not be started: {error}") from error
            assert process.stdin is not None, "asked for as PIPE"
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
            return cls(process, socket, stack.pop_all(), folder)

    def send(self, command: Command) -> None:
        """Queue a command, in order; never blocks, and does nothing once the worker is gone."""
        if not self._socket.closed:
            self._socket.send(self._encoder.encode(command))

    async def receive(self) -> Event:
        """The next event; raises `WorkerError` when the worker has died."""
        frame = asyncio.ensure_future(self._socket.recv())
        await asyncio.wait({frame, self._exit}, return_when=asyncio.FIRST_COMPLETED)
        if not frame.done():
            frame.cancel()
            raise WorkerError(
                f"the worker process died ({_how(self._exit.result())}); it is started again; see its log"
            )
        if not self._has_spoken:
            self._has_spoken = True
            self._folder.cleanup()  # it is connected: nothing is left behind however this process ends
        try:
            return self._decoder.decode(frame.result())
        except msgspec.DecodeError as error:
            raise WorkerError(f"the worker sent what is no event: {error}; it is started again") from error

    def kill(self) -> None:
        """End a worker that does not answer; `receive` then raises."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        """Wait briefly for the worker to end by itself, then end it; returns when its process is gone."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # the worker reads this as the end of its parent
        # One that is still importing has nothing to finish, and would not listen for seconds.
        await asyncio.wait({self._exit}, timeout=LEAVE_TIMEOUT_S if self._has_spoken else 0)
        if not self._exit.done():
            self.kill()
            await self._exit
        self._resources.close()


def _how(return_code: int) -> str:
    if return_code >= 0:
        return f"exit code {return_code}"
    if -return_code == signal.SIGBUS:  # on a CPU weights are used where they lie in their files
        why = "a model's file became shorter, or its disk failed, while it was in use"
        return f"signal {-return_code}: {why}; check it with flash verify MODEL"
    return f"signal {-return_code}"
