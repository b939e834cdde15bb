"""Files and batches through the official client, in front of a scripted worker."""

import json
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from openai.types import Batch, BatchUsage

from flashtensors.errors import CapacityError
from flashtensors.server.batches import run
from flashtensors.worker.messages import Generate

from .conftest import ANSWER, FakeDaemon, StartDaemon

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def daemon(clean_daemon: FakeDaemon) -> FakeDaemon:
    return clean_daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client


def upload(client: openai.OpenAI, lines: list[dict[str, object]]) -> str:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=("input.jsonl", data), purpose="batch").id


def line(custom_id: str, url: str = CHAT, **body: object) -> dict[str, object]:
    prompt = {"messages": [{"role": "user", "content": "What?"}]} if url == CHAT else {"prompt": "What?"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny"} | prompt | body}


def end(client: openai.OpenAI, batch: Batch) -> Batch:
    deadline_s = time.monotonic() + 20
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        assert time.monotonic() < deadline_s
        batch = client.batches.retrieve(batch.id)
    return batch


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def num_asked(daemon: FakeDaemon) -> int:
    return sum(isinstance(command, Generate) for link in daemon.script.links for command in link.commands)


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    assert file_id is not None
    entries = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    return {entry["custom_id"]: entry for entry in entries}


def summed_usage(entries: dict[str, dict]) -> BatchUsage:
    """What the answers of a batch say that they took."""
    usages = [entry["response"]["body"]["usage"] for entry in entries.values()]
    num_input, num_output = (sum(usage[f"{kind}_tokens"] for usage in usages) for kind in ("prompt", "completion"))
    assert num_input > 0 < num_output
    return BatchUsage.model_validate(
        {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
            },
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        }
    )


def test_a_file_lives_and_dies(client: openai.OpenAI) -> None:
    data = b"\x00any bytes \xff" * 100_000
    created = client.files.create(
        file=("naïve.jsonl", data), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (created.bytes, created.filename, created.purpose) == (len(data), "naïve.jsonl", "batch")
    assert created.expires_at == created.created_at + 3600
    assert client.files.retrieve(created.id) == created
    assert client.files.content(created.id).read() == data
    assert created in list(client.files.list(purpose="batch"))
    assert client.files.delete(created.id).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(created.id)


def test_files_are_listed_in_pages(client: openai.OpenAI) -> None:
    ids = {client.files.create(file=b"x", purpose="batch").id for _ in range(5)}
    for order in ("asc", "desc"):
        listed = [file.id for file in client.files.list(limit=2, order=order) if file.id in ids]
        assert sorted(listed) == sorted(ids)
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(limit=0)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.files.list(after="file-nonesuch")
    for file_id in ids:
        client.files.delete(file_id)


def test_other_purposes_and_fields_are_refused(client: openai.OpenAI, daemon: FakeDaemon) -> None:
    with pytest.raises(openai.BadRequestError, match="takes 'batch' only"):
        client.files.create(file=b"x", purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="must be between"):
        client.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})
    with daemon.client() as http:
        assert http.post("/v1/files", json={}).json()["error"]["param"] == "content-type"
        response = http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch", "purpos": "x"})
        assert response.json()["error"]["message"] == "unknown field 'purpos'"


def test_a_batch_of_chats_is_answered_as_they_are_alone(client: openai.OpenAI, daemon: FakeDaemon) -> None:
    names = [f"request-{number}" for number in range(30)]
    file_id = upload(client, [line(name, logprobs=True) for name in names])
    batch = client.batches.create(
        input_file_id=file_id, endpoint=CHAT, completion_window="24h", metadata={"for": "a test"}
    )
    assert (batch.object, batch.metadata, batch.completion_window) == ("batch", {"for": "a test"}, "24h")
    batch = end(client, batch)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (30, 30, 0)
    found = results(client, batch.output_file_id)
    assert sorted(found) == sorted(names)
    assert (batch.usage, batch.model) == (summed_usage(found), "tiny")
    alone = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "What?"}], logprobs=True)
    for entry in found.values():
        answer = openai.types.chat.ChatCompletion.model_validate(entry["response"]["body"])
        assert answer.choices == alone.choices
        assert answer.choices[0].message.content == ANSWER
    assert batch.output_file_id is not None
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert batch in list(client.batches.list(limit=2))
    requests = [command.request for command in daemon.link.commands if isinstance(command, Generate)]
    assert {request.priority for request in requests[-31:]} == {0, 1}


def test_requests_that_cannot_be_served_have_their_own_errors(client: openai.OpenAI) -> None:
    lines = [
        line("good", TEXT),
        line("hot", TEXT, temperature=1000),
        line("streamed", TEXT, stream=True),
        line("long", TEXT, prompt="word " * 3000),
        line("unknown", TEXT, temprature=1),
    ]
    batch = client.batches.create(input_file_id=upload(client, lines), endpoint=TEXT, completion_window="24h")
    batch = end(client, batch)
    assert batch.status == "completed"
    assert list(results(client, batch.output_file_id)) == ["good"]
    found = {
        name: (entry["response"]["status_code"], entry["response"]["body"]["error"]["code"])
        for name, entry in results(client, batch.error_file_id).items()
    }
    assert found == {
        "hot": (400, "invalid_request"),
        "streamed": (400, "unsupported_field"),
        "long": (400, "context_length_exceeded"),
        "unknown": (400, "invalid_request"),
    }


def test_a_file_with_bad_lines_fails_the_batch(client: openai.OpenAI) -> None:
    lines = [line("a"), line("a"), line("b", TEXT), line("c", model="nonesuch")]
    batch = client.batches.create(input_file_id=upload(client, lines), endpoint=CHAT, completion_window="24h")
    batch = end(client, batch)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_url"),
        (4, "model_not_found"),
    ]


def test_a_batch_is_cancelled(client: openai.OpenAI, daemon: FakeDaemon) -> None:
    daemon.script.token_delay_s = 0.5  # a batch that a busy machine cannot end before it is cancelled
    file_id = upload(client, [line(f"{number}") for number in range(100)])
    batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="belongs to batch"):
        client.files.delete(file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = end(client, batch)
    assert batch.status == "cancelled"
    assert len(results(client, batch.error_file_id)) == 100
    assert client.files.delete(file_id).deleted
    deadline_s = time.monotonic() + 20
    while daemon.link.running:
        assert time.monotonic() < deadline_s


def test_a_full_queue_and_a_lost_worker_are_waited_for(
    start_fake_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_DELAY_S", 0.001)
    for name in ("MAX_WAIT_FOR_ROOM_S", "MAX_DELAY_S"):
        monkeypatch.setattr(run, name, 0.01)
    daemon = start_fake_daemon()
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        daemon.script.refuses_requests = True
        batch = client.batches.create(
            input_file_id=upload(client, [line("a", TEXT), line("b", TEXT)]), endpoint=TEXT, completion_window="24h"
        )
        wait_for(lambda: num_asked(daemon) > 4 * run.MAX_TRIES)
        daemon.script.num_refused_starts = 10**9
        daemon.link.kill()
        wait_for(lambda: daemon.context.models.supervisor.state == "backing_off")
        assert client.batches.retrieve(batch.id).status == "in_progress"
        wait_for(lambda: daemon.script.num_starts > 8)
        daemon.script.num_refused_starts, daemon.script.refuses_requests = 0, False
        batch = end(client, batch)
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 0)


@pytest.fixture
def _retries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_DELAY_S", "MAX_WAIT_FOR_ROOM_S", "MAX_DELAY_S"):
        monkeypatch.setattr(run, name, 0.001)


@pytest.mark.usefixtures("_retries_at_once")
def test_a_request_that_kills_every_worker_fails_alone(start_fake_daemon: StartDaemon) -> None:
    daemon = start_fake_daemon()
    daemon.script.deadly_seed = 13
    daemon.script.token_delay_s = 0.001
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        lines = [line(f"{number}", TEXT, seed=number, max_tokens=8) for number in range(20)]
        batch = end(
            client,
            client.batches.create(input_file_id=upload(client, lines), endpoint=TEXT, completion_window="24h"),
        )
        failures = results(client, batch.error_file_id)
        assert len(results(client, batch.output_file_id)) == 19
    assert list(failures) == ["13"]
    assert "the worker process died" in failures["13"]["response"]["body"]["error"]["message"]
    assert daemon.script.num_starts - 1 == 1 + run.MAX_DEATHS_ALONE


@pytest.mark.usefixtures("_retries_at_once")
def test_workers_that_die_as_they_start_fail_no_request(start_fake_daemon: StartDaemon) -> None:
    daemon = start_fake_daemon()
    daemon.script.token_delay_s = 0.02
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        lines = [line(f"{number}", TEXT, max_tokens=8) for number in range(4)]
        batch = client.batches.create(input_file_id=upload(client, lines), endpoint=TEXT, completion_window="24h")
        wait_for(lambda: num_asked(daemon) > 0)
        daemon.script.start_delay_s = 0.02
        daemon.script.num_refused_starts = daemon.script.num_starts + 2 * run.MAX_DEATHS_ALONE
        daemon.link.kill()
        batch = end(client, batch)
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (4, 0)
    assert daemon.script.num_starts > daemon.script.num_refused_starts


def test_a_model_that_the_device_cannot_hold_is_no_full_queue(
    start_fake_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(run, "MAX_DELAY_S", 0.001)
    daemon = start_fake_daemon()
    daemon.script.load_error = CapacityError("tiny needs more bytes than there are")  # pyright: ignore
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        batch = client.batches.create(
            input_file_id=upload(client, [line("a", TEXT)]), endpoint=TEXT, completion_window="24h"
        )
        batch = end(client, batch)
        failure = results(client, batch.error_file_id)["a"]["response"]
    assert (failure["status_code"], failure["body"]["error"]["code"]) == (503, "over_capacity")
    assert "more bytes than there are" in failure["body"]["error"]["message"]
    assert num_asked(daemon) == run.MAX_TRIES


def test_a_batch_is_cancelled_without_a_body(client: openai.OpenAI, daemon: FakeDaemon) -> None:
    daemon.script.token_delay_s = 0.5
    file_id = upload(client, [line(f"{number}") for number in range(20)])
    json_type = {"content-type": "application/json"}
    with daemon.client() as http:
        for body in ({}, {"headers": json_type}, {"json": {}}):
            batch = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
            path = f"/v1/batches/{batch.id}/cancel"
            for wrong in ({"json": {"why": "x"}}, {"json": []}, {"content": b"{}"}, {"data": {"a": "b"}}):
                assert http.post(path, **wrong).status_code == 400
            assert client.batches.retrieve(batch.id).status in ("validating", "in_progress")
            response = http.post(path, **body)
            assert (response.status_code, response.json()["status"]) == (200, "cancelling")
            end(client, batch)
        for path in ("/v1/batches", "/v1/chat/completions", "/v1/completions"):
            assert http.post(path).json()["error"]["param"] == "content-type"


def test_what_is_no_batch_is_refused(client: openai.OpenAI) -> None:
    file_id = upload(client, [line("a")])
    for wrong in ({"endpoint": "/v1/embeddings"}, {"completion_window": "1h"}, {"metadata": {"x": "y" * 513}}):
        arguments = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"} | wrong
        with pytest.raises(openai.BadRequestError):
            client.batches.create(**arguments)  # pyright: ignore
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-nonesuch", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_nonesuch")


def test_the_files_of_others_need_the_key(start_fake_daemon) -> None:
    daemon = start_fake_daemon(api_key="secret")
    with daemon.client() as http:
        for method, path in (("GET", "/v1/files"), ("POST", "/v1/files"), ("POST", "/v1/batches")):
            assert http.request(method, path).status_code == 401
        assert http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"}).status_code == 401
    with daemon.client(authorization="Bearer secret") as http:
        response: httpx.Response = http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"})
        assert response.status_code == 200
