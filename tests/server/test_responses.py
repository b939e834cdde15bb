"""When a stream's status is decided, how it shows life, and how it ends."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from flashtensors.errors import CapacityError, ContextTooLong, WorkerError
from flashtensors.server import responses
from flashtensors.server.responses import (
    NDJSON,
    SSE,
    FileDownload,
    Framing,
    error_response,
    ollama_error_body,
    open_stream,
)

QUICK_S = 0.02


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMIT_AFTER_S", "HEARTBEAT_S", "WRITE_STALL_S"):
        monkeypatch.setattr(responses, name, QUICK_S)


class Source:
    """Items with pauses before them; an exception is raised in its place."""

    def __init__(self, *steps: tuple[float, object]) -> None:
        self._steps = steps
        self.is_closed = False

    async def items(self) -> AsyncGenerator[object]:
        try:
            for pause_s, item in self._steps:
                await asyncio.sleep(pause_s)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.is_closed = True


async def send_all(source: Source, framing: Framing, *, stalls: bool = False) -> tuple[int, bytes, bool]:
    """Status, bytes, and whether the stream was ended properly."""
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)
        if stalls and message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def receive() -> dict:
        raise AssertionError("a stream does not read")

    response = await open_stream(source.items(), framing)
    await response({"type": "http"}, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body, sent[-1].get("more_body") is False


def test_items_and_the_end_of_each_framing() -> None:
    steps = ((0, {"a": 1}), (0, {"a": 2}))
    assert asyncio.run(send_all(Source(*steps), SSE)) == (
        200, b'data: {"a":1}\n\ndata: {"a":2}\n\ndata: [DONE]\n\n', True,
    )  # fmt: skip
    assert asyncio.run(send_all(Source(*steps), NDJSON)) == (200, b'{"a":1}\n{"a":2}\n', True)


def test_an_error_before_the_first_item_is_raised_so_that_it_gets_a_status() -> None:
    source = Source((0, ContextTooLong("too long")))
    with pytest.raises(ContextTooLong):
        asyncio.run(send_all(source, SSE))
    assert source.is_closed


def test_a_late_first_item_is_awaited_with_heartbeats() -> None:
    _, body, _ = asyncio.run(send_all(Source((QUICK_S * 5, {"a": 1})), SSE))
    beats, _, rest = body.partition(b"data: ")
    assert beats
    assert beats.replace(b": waiting\n\n", b"") == b""
    assert rest == b'{"a":1}\n\ndata: [DONE]\n\n'


def test_a_late_ndjson_stream_is_silent_until_its_first_item() -> None:
    _, body, _ = asyncio.run(send_all(Source((QUICK_S * 5, {"a": 1})), NDJSON))
    assert body == b'{"a":1}\n'


@pytest.mark.parametrize("pause_s", [0, QUICK_S * 5])
def test_an_error_after_the_start_is_the_last_event_and_done_is_not_said(pause_s: float) -> None:
    status, body, has_ended = asyncio.run(send_all(Source((0, {"a": 1}), (pause_s, WorkerError("died"))), SSE))
    assert (status, has_ended) == (200, True)
    last = body.strip().split(b"\n\n")[-1].removeprefix(b"data: ")
    assert json.loads(last)["error"]["code"] == "worker_failed"


def test_a_bug_after_the_start_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    _, body, _ = asyncio.run(send_all(Source((0, {"a": 1}), (0, ZeroDivisionError("secret"))), NDJSON))
    assert json.loads(body.splitlines()[-1])["code"] == "internal_error"
    assert b"secret" not in body
    assert "secret" in caplog.text


def test_a_client_that_stops_reading_is_dropped_and_the_source_closed() -> None:
    source = Source((0, {"a": 1}), (0, {"a": 2}))
    _, _, has_ended = asyncio.run(send_all(source, SSE, stalls=True))
    assert not has_ended
    assert source.is_closed


def test_cancelling_closes_the_source() -> None:
    async def scenario() -> Source:
        source = Source((0, {"a": 1}), (3600, {"a": 2}))
        task = asyncio.create_task(send_all(source, SSE))
        await asyncio.sleep(QUICK_S)
        task.cancel()
        await asyncio.wait({task})
        return source

    assert asyncio.run(scenario()).is_closed


def test_errors_carry_what_clients_retry_by() -> None:
    response = error_response(CapacityError("full"), ollama_error_body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert json.loads(bytes(response.body)) == {"error": "full", "code": "over_capacity"}


def test_a_list_of_items_is_written_at_once() -> None:
    source = Source((0, [{"a": 1}, {"a": 2}]), (0, {"a": 3}))
    _, body, _ = asyncio.run(send_all(source, SSE))
    assert body == b'data: {"a":1}\n\ndata: {"a":2}\n\ndata: {"a":3}\n\ndata: [DONE]\n\n'


def test_a_slow_source_is_no_stalled_client() -> None:
    _, body, has_ended = asyncio.run(send_all(Source((0, {"a": 1}), (QUICK_S * 5, {"a": 2})), NDJSON))
    assert (body, has_ended) == (b'{"a":1}\n{"a":2}\n', True)


@pytest.mark.parametrize("stalls", [False, True])
def test_a_file_is_sent_whole_unless_its_reader_stops(tmp_path: Path, stalls: bool) -> None:
    data = b"0123456789" * 50_000
    (tmp_path / "file").write_bytes(data)
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)
        if stalls and message["type"] == "http.response.body":
            await asyncio.sleep(3600)

    async def receive() -> dict:
        await asyncio.Event().wait()
        return {}

    scope = {"type": "http", "method": "GET", "headers": []}
    asyncio.run(FileDownload(tmp_path / "file", filename="x")(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    assert (body == data) is not stalls
