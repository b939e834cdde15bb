"""The client that commands use: typed errors come back as the class they were."""

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from flashtensors.errors import (
    AuthenticationError,
    CapacityError,
    DaemonError,
    ModelNotFound,
    UnsupportedField,
    WorkerError,
)
from flashtensors.server.client import DaemonClient, answered_error
from flashtensors.server.launch import DaemonInfo

from .conftest import ANSWER, FakeDaemon, StartDaemon

PROMPT = {"model": "tiny", "prompt": "x"}


def client_of(daemon: FakeDaemon, api_key: str | None = None) -> DaemonClient:
    info = DaemonInfo(pid=1, host="127.0.0.1", port=daemon.port, started_unix_s=0, version="0")
    return DaemonClient(info, api_key)


def test_objects_and_streams(clean_daemon: FakeDaemon) -> None:
    client = client_of(clean_daemon)
    assert client.post("/api/generate", {**PROMPT, "stream": False})["response"] == ANSWER
    assert "".join(str(line["response"]) for line in client.stream("/api/generate", PROMPT)) == ANSWER


def test_errors_are_what_they_were(clean_daemon: FakeDaemon, start_fake_daemon: StartDaemon) -> None:
    client = client_of(clean_daemon)
    with pytest.raises(ModelNotFound):
        client.post("/api/show", {"model": "tinny"})
    with pytest.raises(ModelNotFound):
        client.get("/v1/models/tinny")
    with pytest.raises(UnsupportedField):
        list(client.stream("/api/generate", {**PROMPT, "suffix": "x"}))
    clean_daemon.script.dies_after_tokens = 3
    with pytest.raises(WorkerError):
        list(client.stream("/api/generate", PROMPT))
    locked = start_fake_daemon(api_key="k")
    with pytest.raises(AuthenticationError, match="set FLASH_API_KEY"):
        client_of(locked).get("/api/tags")
    assert client_of(locked, "k").get("/api/tags")["models"]


def test_closing_a_stream_stops_the_work(daemon: FakeDaemon) -> None:
    daemon.script.eos, daemon.script.token_delay_s = None, 0.005
    with contextlib.closing(client_of(daemon).stream("/api/generate", PROMPT)) as lines:
        next(lines)
        assert daemon.link.running
    while daemon.link.running:
        pass


@pytest.mark.parametrize("num_bytes", [None, 0, 4, 14])
def test_a_daemon_that_dies_within_an_answer_is_a_daemon_error(num_bytes: int | None) -> None:
    """Wherever the stream is cut, its beginning does not pass for the whole."""
    head = b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{"a": 1}\n\r\n'
    rest = b'9\r\n{"a": 2}\n\r\n0\r\n\r\n'

    def answer_once(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(head + rest[:num_bytes])

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as thread:
        answered = thread.submit(answer_once, listener)
        info = DaemonInfo(pid=1, host="127.0.0.1", port=listener.getsockname()[1], started_unix_s=0, version="0")
        lines: list[object] = []
        with contextlib.nullcontext() if num_bytes is None else pytest.raises(DaemonError, match="broke"):
            lines.extend(DaemonClient(info).stream("/api/generate", {}))
        answered.result()
    assert lines == ([{"a": 1}, {"a": 2}] if num_bytes is None else lines)


def test_nobody_there_is_a_daemon_error() -> None:
    nobody = DaemonInfo(pid=1, host="127.0.0.1", port=1, started_unix_s=0, version="0")
    with pytest.raises(DaemonError, match=r"127\.0\.0\.1:1"):
        DaemonClient(nobody).get("/health")


def test_any_answer_that_is_no_success_is_an_error() -> None:
    refused = answered_error(503, b'{"error": {"message": "full", "code": "over_capacity"}}')
    assert (type(refused), refused.message) == (CapacityError, "full")
    assert answered_error(502, b"<html>").message == "<html>"
