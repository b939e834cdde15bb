"""The worker's process: its loop against fakes, and one real process from its first to its last message."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from flashtensors.config import Settings
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.worker.messages import (
    Command,
    Deltas,
    Event,
    Generate,
    LoadModel,
    ModelLoaded,
    RequestFailed,
    Shutdown,
    UnloadModel,
    WorkerReady,
)
from flashtensors.worker.process import CommandLoop, Doorbell

from .fake_models import Bench, load_command, request

_EVENTS = msgspec.msgpack.Decoder(Event)


class Parent:
    """The other end of a worker's socket and of its standard input."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def send(self, command: Command) -> None:
        self.socket.send(msgspec.msgpack.encode(command))

    def receive(self, timeout_s: float = 60.0) -> Event:
        assert self.socket.poll(int(timeout_s * 1000)), "the worker is silent"
        return _EVENTS.decode(self.socket.recv())

    def wait_for(self, kind: type) -> Event:
        while not isinstance(event := self.receive(), kind):
            pass
        return event


class LoopInThread:
    """A `CommandLoop` with a fake worker on a thread."""

    def __init__(self, parent: Parent, worker_socket: zmq.Socket[bytes]) -> None:
        self.parent = parent
        self.stdin_fd, self.parent_fd = os.pipe()
        self.doorbell = Doorbell()
        self.loop = CommandLoop(worker_socket, self.stdin_fd, self.doorbell)
        bench = Bench(emit=self.loop.emit, wake=self.doorbell.ring)
        self.thread = threading.Thread(target=self.loop.run, args=(bench.worker,))
        self.thread.start()

    def join(self) -> bool:
        self.thread.join(20)
        return not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[LoopInThread]:
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours, context.socket(zmq.PAIR) as theirs:
        ours.bind("inproc://worker")
        theirs.connect("inproc://worker")
        running = LoopInThread(Parent(ours), theirs)
        yield running
        running.loop.stop()
        assert running.join()
        running.doorbell.close()


def test_the_loop_carries_commands_and_events(running: LoopInThread) -> None:
    parent = running.parent
    parent.send(load_command("a"))
    assert isinstance(parent.wait_for(ModelLoaded), ModelLoaded)
    parent.send(Generate(request=request("r", "a", max_tokens=3)))
    token_ids: list[int] = []
    while len(token_ids) < 3:
        event = parent.wait_for(Deltas)
        assert isinstance(event, Deltas)
        token_ids += [token_id for delta in event.deltas for token_id in delta.token_ids]
    parent.send(Shutdown())
    assert running.join()


@pytest.mark.parametrize(
    "frame", [b"", b"\xff\xff", b"\x81", msgspec.msgpack.encode({"type": "Format"}), b"\x91" * 100_000]
)
def test_frames_that_are_no_commands_change_nothing(
    running: LoopInThread, frame: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    running.parent.socket.send(frame)
    running.parent.send(load_command("a"))
    running.parent.wait_for(ModelLoaded)
    assert "is no command" in caplog.text


def test_a_request_with_wrong_fields_is_answered(running: LoopInThread) -> None:
    body = msgspec.to_builtins(Generate(request=request("r", "a")))
    body["request"]["sampling"]["top_p"] = 7.0
    running.parent.socket.send(msgspec.msgpack.encode(body))
    failed = running.parent.wait_for(RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert failed.request_id == "r"
    assert "top_p is 7.0" in failed.error.message


def test_the_loop_ends_when_its_parent_does(running: LoopInThread) -> None:
    os.close(running.parent_fd)
    assert running.join()


def test_the_loop_ends_when_it_is_stopped(running: LoopInThread) -> None:
    running.loop.stop()
    assert running.join()


def test_a_doorbell_rings_once_for_many_rings() -> None:
    doorbell = Doorbell()
    for _ in range(100_000):  # more than a pipe holds
        doorbell.ring()
    doorbell.silence()
    assert zmq.select([doorbell.fileno()], [], [], 0)[0] == []
    doorbell.ring()
    assert zmq.select([doorbell.fileno()], [], [], 0)[0] == [doorbell.fileno()]
    doorbell.close()


class RealWorker:
    """`python -m flashtensors.worker.process`."""

    def __init__(self, folder: Path, context: zmq.Context[zmq.Socket[bytes]], **settings: object) -> None:
        socket = context.socket(zmq.PAIR)
        endpoint = f"ipc://{folder}/worker"
        socket.bind(endpoint)
        self.parent = Parent(socket)
        command = [sys.executable, "-m", "flashtensors.worker.process", "--connect", endpoint]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(Settings(**settings)) + b"\n")  # pyright: ignore
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.parent.socket.close()


def test_a_real_process_serves_a_checkpoint_and_ends_on_sigterm(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    with zmq.Context() as context:
        worker = RealWorker(tmp_path, context, device="cpu", max_num_seqs=4)
        parent = worker.parent
        try:
            ready = parent.receive()
            assert isinstance(ready, WorkerReady)
            assert (ready.pid, ready.device) == (worker.process.pid, "cpu")
            parent.send(LoadModel(model="tiny", folder=str(folder)))
            parent.wait_for(ModelLoaded)
            parent.send(Generate(request=request("r", "tiny", max_tokens=1)))
            deltas = parent.wait_for(Deltas)
            assert isinstance(deltas, Deltas)
            assert deltas.deltas[0].finish_reason is not None
            parent.send(UnloadModel(model="tiny"))
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(20) == 0
        finally:
            worker.end()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "ready"])
def test_a_real_process_leaves_with_its_parent(tmp_path: Path, when: str) -> None:
    with zmq.Context() as context:
        worker = RealWorker(tmp_path, context, device="cpu")
        try:
            if when == "ready":
                worker.parent.receive()
        finally:
            worker.end()
        assert worker.process.returncode == 0


@pytest.mark.slow
def test_a_device_that_is_not_there_ends_the_process_with_a_message(tmp_path: Path) -> None:
    line = msgspec.json.encode(Settings(device="cuda:99")) + b"\n"
    command = [sys.executable, "-m", "flashtensors.worker.process", "--connect", f"ipc://{tmp_path}/worker"]
    ended = subprocess.run(command, input=line, capture_output=True, timeout=60)
    assert ended.returncode == 1
    assert b"device is 'cuda:99'" in ended.stderr
