"""A client that leaves stops the work it caused, at every stage."""

import socket
import time
from collections.abc import Callable

import msgspec
import pytest

from flashtensors.worker.messages import Abort, Generate

from .conftest import FakeDaemon
from .fake_worker import FakeScript


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.002)


def send(daemon: FakeDaemon, path: str, body: dict[str, object]) -> socket.socket:
    """Send a request and leave its answer unread."""
    data = msgspec.json.encode(body)
    connection = socket.create_connection(("127.0.0.1", daemon.port))
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def num_running(daemon: FakeDaemon) -> int:
    return len(daemon.script.links[0].running)


def ids(daemon: FakeDaemon, kind: type) -> set[str]:
    return {
        command.request.request_id if isinstance(command, Generate) else command.request_id
        for command in daemon.script.links[0].commands
        if isinstance(command, kind)
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_leaving_while_tokens_come(daemon: FakeDaemon, script: FakeScript, path: str, stream: bool) -> None:
    script.token_delay_s, script.eos = 0.01, None
    options = {"max_tokens": 400} if path.startswith("/v1") else {}
    connection = send(daemon, path, {"model": "tiny", "prompt": "x", "stream": stream, **options})
    until(lambda: bool(daemon.script.links) and num_running(daemon) == 1)
    connection.close()
    until(lambda: num_running(daemon) == 0)
    assert ids(daemon, Abort) == ids(daemon, Generate)
    until(lambda: daemon.context.drain.num_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_the_model_loads_aborts_the_request(daemon: FakeDaemon, script: FakeScript, stream: bool) -> None:
    script.load_delay_s = 0.2
    connection = send(daemon, "/v1/completions", {"model": "tiny", "prompt": "x", "stream": stream})
    until(lambda: daemon.context.drain.num_running == 1)
    until(lambda: len(ids(daemon, Generate)) == 1)
    connection.close()
    until(lambda: daemon.context.drain.num_running == 0)
    assert ids(daemon, Abort) == ids(daemon, Generate)


def test_leaving_during_several_prompts_aborts_all_of_them(daemon: FakeDaemon, script: FakeScript) -> None:
    script.token_delay_s, script.eos = 0.01, None
    connection = send(daemon, "/v1/completions", {"model": "tiny", "prompt": ["x", "y", "z"], "max_tokens": 400})
    until(lambda: bool(daemon.script.links) and num_running(daemon) == 3)
    connection.close()
    until(lambda: num_running(daemon) == 0)
    assert ids(daemon, Abort) == ids(daemon, Generate)
