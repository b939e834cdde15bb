"""The Ollama routes, driven by the official client, in front of a scripted worker."""

import datetime
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import ollama
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.errors import TransferError
from flashtensors.worker.messages import Forget, LoadProgress, Prefetch, Register
from flashtensors.worker.stats import Whereabouts

from .conftest import ANSWER, FakeDaemon, StartDaemon
from .fake_worker import FakeScript

QUESTION = [{"role": "user", "content": "What?"}]
GREEDY = {"temperature": 0}


@pytest.fixture
def daemon(clean_daemon: FakeDaemon) -> FakeDaemon:
    return clean_daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[ollama.Client]:
    with ollama.Client(host=daemon.url, timeout=20) as client:
        yield client


def test_generate_and_chat_answer(client: ollama.Client) -> None:
    generated = client.generate("tiny", "What?", options=GREEDY)
    assert (generated.response, generated.done_reason) == (ANSWER, "stop")
    assert client.chat("tiny", QUESTION).message.content == ANSWER
    assert generated.total_duration is not None
    assert generated.eval_duration is not None
    assert generated.total_duration >= generated.eval_duration > 0
    assert generated.prompt_eval_count is not None
    assert generated.prompt_eval_count > 5


def test_streams_say_the_same_in_pieces(client: ollama.Client) -> None:
    parts = list(client.generate("tiny", "What?", stream=True))
    assert "".join(part.response or "" for part in parts) == ANSWER
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    chunks = list(client.chat("tiny", QUESTION, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].done_reason == "stop"


def test_streams_are_ndjson_and_the_default(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        response = http.post("/api/generate", json={"model": "tiny", "prompt": "x"})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert json.loads(response.text.splitlines()[-1])["done"] is True


def test_a_model_without_a_template_continues_the_prompt(client: ollama.Client) -> None:
    assert client.generate("plain", "Once").response == ANSWER
    with pytest.raises(ollama.ResponseError, match="system needs a chat template"):
        client.generate("plain", "Once", system="be kind")
    with pytest.raises(ollama.ResponseError, match="no chat template"):
        client.chat("plain", QUESTION)


def test_raw_takes_the_prompt_as_it_is(client: ollama.Client) -> None:
    raw = client.generate("tiny", "What?", raw=True).prompt_eval_count
    templated = client.generate("tiny", "What?").prompt_eval_count
    with_system = client.generate("tiny", "What?", system="be kind").prompt_eval_count
    assert raw is not None
    assert templated is not None
    assert with_system is not None
    assert raw < templated < with_system


def test_options_reach_the_worker(client: ollama.Client) -> None:
    limited = client.generate("tiny", "x", options={"num_predict": 3, "stop": ["zzz"], "seed": 7, "top_k": -1})
    assert (limited.done_reason, limited.eval_count) == ("length", 3)
    stopped = client.generate("tiny", "x", options={"stop": ["world", "One"]})
    assert (stopped.response, stopped.done_reason) == ("Hello ", "stop")


def test_logprobs(client: ollama.Client) -> None:
    for stream in (False, True):
        answer = client.generate("tiny", "x", logprobs=True, top_logprobs=2, options={"num_predict": 4}, stream=stream)
        parts = list(answer) if stream else [answer]
        found = [position for part in parts for position in part.logprobs or []]
        assert [len(position.top_logprobs or []) for position in found] == [2] * 4


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/api/generate", {"options": {"num_ctx": 4096}}, "num_ctx"),
        ("/api/generate", {"options": {"mirostat": 1}}, "mirostat"),
        ("/api/generate", {"options": {"temperature": "hot"}}, "temperature"),
        ("/api/generate", {"options": {"num_predict": -5}}, "num_predict"),
        ("/api/generate", {"images": ["aGk="]}, "images"),
        ("/api/generate", {"suffix": "x"}, "suffix"),
        ("/api/generate", {"format": "json"}, "format"),
        ("/api/generate", {"think": True}, "think"),
        ("/api/generate", {"nonsense": 1}, "nonsense"),
        ("/api/generate", {"keep_alive": "soon"}, "keep_alive"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images"),
        ("/api/chat", {"messages": QUESTION, "tools": [{"type": "function"}]}, "tools"),
        ("/api/pull", {"insecure": True}, "insecure"),
        ("/api/show", {"model": "../../etc/passwd"}, "passwd"),
    ],
)
def test_what_is_not_served_is_refused_by_name(daemon: FakeDaemon, path: str, fields: dict, named: str) -> None:
    prompt = {"prompt": "x"} if path == "/api/generate" else {}
    with daemon.client() as http:
        response = http.post(path, json={"model": "tiny", **prompt, **fields})
    assert response.status_code == 400
    assert named in response.json()["error"]


def test_an_empty_prompt_loads_and_keep_alive_zero_unloads(client: ollama.Client) -> None:
    assert client.ps().models == []
    assert client.generate("tiny").done_reason == "load"
    (running,) = client.ps().models
    assert (running.name, running.size) == ("tiny", 1500)
    assert running.expires_at is not None
    assert running.expires_at > datetime.datetime.now(datetime.UTC)
    assert client.chat("tiny", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    client.generate("tiny", "x", keep_alive=0)
    assert client.ps().models == []


def test_tags_and_show(client: ollama.Client) -> None:
    (plain, tiny) = client.list().models
    assert (plain.model, tiny.model) == ("plain", "tiny")
    assert tiny.digest is not None
    assert len(tiny.digest) == len("sha256:") + 64
    shown = client.show("tiny")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 512
    assert shown.template is not None
    assert "im_start" in shown.template
    assert client.show("plain").template == ""


def test_unknown_models_are_404(client: ollama.Client) -> None:
    for call in (lambda: client.generate("tinny", "x"), lambda: client.show("tinny"), lambda: client.delete("tinny")):
        with pytest.raises(ollama.ResponseError, match="tiny") as caught:
            call()
        assert caught.value.status_code == 404


def test_a_failed_load_is_an_error_with_its_status(client: ollama.Client, script: FakeScript) -> None:
    script.load_error = TransferError("model.safetensors: read 10 of 20 bytes at offset 0")
    with pytest.raises(ollama.ResponseError, match="read 10 of 20") as caught:
        list(client.generate("tiny", "x", stream=True))
    assert caught.value.status_code == 500


def test_a_worker_that_dies_mid_stream_ends_it_with_an_error(client: ollama.Client, script: FakeScript) -> None:
    script.dies_after_tokens, script.token_delay_s = 4, 0.001
    stream = client.generate("tiny", "x", stream=True)
    with pytest.raises(ollama.ResponseError, match="worker"):
        list(stream)


@pytest.mark.parametrize("bytes_per_s", [None, 3.1e9])
def test_load_reports_progress(daemon: FakeDaemon, script: FakeScript, bytes_per_s: float | None) -> None:
    script.load_delay_s, script.load_bytes_per_s = 0.25, bytes_per_s
    with daemon.client() as http:
        response = http.post("/api/load", json={"model": "tiny", "keep_alive": "10m", "is_pinned": True})
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert lines[0] == {"status": "read", "completed": 500, "total": 1000, "bytes_per_s": bytes_per_s}
        assert lines[-1]["status"] == "success"
        assert lines[-1]["was_loaded"] is False
        assert http.get("/api/ps").json()["models"][0]["is_pinned"] is True
        again = http.post("/api/load", json={"model": "tiny", "stream": False}).json()
    assert again["status"] == "success"


def test_load_brings_a_model_to_host_memory(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        answer = http.post("/api/load", json={"model": "tiny", "tier": "host", "stream": False}).json()
        assert answer == {"status": "success", "host_bytes": 1000, "image_bytes": 1000}
        assert http.post("/api/load", json={"model": "tiny", "tier": "moon"}).status_code == 400
    assert Prefetch(model="tiny") in daemon.link.commands


def test_ps_says_where_models_are(daemon: FakeDaemon) -> None:
    place = Whereabouts(model="code", tier="host", state="absent", host_bytes=7, image_bytes=7, num_parked=1)
    with daemon.client() as http:
        http.post("/api/generate", json={"model": "tiny", "prompt": "x", "stream": False}).raise_for_status()
        models = daemon.context.models.supervisor.models
        assert models.stats is not None
        models.stats = msgspec.structs.replace(models.stats, whereabouts=[place], host_bytes=10, hits={"host": 3})
        state = http.get("/api/ps").json()
    assert [model["name"] for model in state["models"]] == ["tiny"]
    assert [(model["model"], model["tier"], model["host_bytes"]) for model in state["host"]] == [("code", "host", 7)]
    assert state["worker"]["hits"] == {"host": 3}


@pytest.mark.parametrize("bytes_per_s", [None, 54.5e9])
def test_ps_says_how_fast_bytes_come_where_that_was_measured(daemon: FakeDaemon, bytes_per_s: float | None) -> None:
    with daemon.client() as http:
        http.post("/api/generate", json={"model": "tiny", "prompt": "x", "stream": False}).raise_for_status()
        models = daemon.context.models.supervisor.models
        assert models.stats is not None
        models.stats = msgspec.structs.replace(models.stats, link_bytes_per_s=bytes_per_s)
        models.progress["code"] = LoadProgress(
            model="code", phase="read", done_bytes=5, total_bytes=7, bytes_per_s=bytes_per_s
        )
        state = http.get("/api/ps").json()
    (loading,) = state["loading"]
    assert loading == {"model": "code", "phase": "read", "completed": 5, "total": 7, "bytes_per_s": bytes_per_s}
    assert (state["worker"]["link_bytes_per_s"], state["worker"]["disk_bytes_per_s"]) == (bytes_per_s, None)


def test_a_model_that_was_pulled_again_is_forgotten_before_it_is_registered_again(
    daemon: FakeDaemon, client: ollama.Client, tiny_store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "again"
    shutil.copytree(tiny_store.parent / "tiny", copy)
    for _ in range(2):
        client.pull(str(copy))
        client.generate("again", "x")
        http_body = {"name": str(copy), "force": True, "stream": False}
        with daemon.client() as http:
            http.post("/api/pull", json=http_body).raise_for_status()
    client.generate("again", "x")
    client.delete("again")
    mine = [command for command in daemon.link.commands if getattr(command, "model", "") == "again"]
    kinds = [type(command) for command in mine if isinstance(command, Register | Forget)]
    assert kinds == [Register, Forget, Register, Forget, Register, Forget]


def test_pull_then_delete(daemon: FakeDaemon, client: ollama.Client, tiny_store: Path, tmp_path: Path) -> None:
    source = tiny_store.parent / "tiny"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    statuses = [part.status for part in client.pull(str(copy), stream=True)]
    assert statuses[-1] == "success"
    assert client.generate("copy", "x").response == ANSWER
    client.delete("copy")
    assert "copy" not in {model.model for model in client.list().models}
    assert "copy" not in {model.name for model in client.ps().models}
    assert (copy / "config.json").exists()


def test_a_pull_that_fails_says_so(client: ollama.Client, tmp_path: Path) -> None:
    with pytest.raises(ollama.ResponseError, match="nothing-here"):
        client.pull(str(tmp_path / "nothing-here"))


def test_paths_are_not_for_clients_of_other_machines(start_fake_daemon: StartDaemon) -> None:
    daemon = start_fake_daemon(server_host="0.0.0.0", api_key="k")
    with daemon.client(authorization="Bearer k") as http:
        response = http.post("/api/pull", json={"model": "/etc"})
    assert response.status_code == 400
    assert "path" in response.json()["error"]


def test_what_ollamas_own_command_sends_is_taken(daemon: FakeDaemon, tiny_store: Path) -> None:
    """It asks for `/` first, and writes fields that it has no value for."""
    with daemon.client() as http:
        assert http.head("/").status_code == 200
        show = {"model": "tiny", "system": "", "template": "", "verbose": False, "options": None, "name": "tiny"}
        assert http.post("/api/show", json=show).status_code == 200
        source = Catalog(tiny_store).get("tiny").source
        pull = {"model": source, "username": "", "password": "", "name": source}
        assert http.post("/api/pull", json=pull).text.splitlines()[-1] == '{"status":"success","model":"tiny"}'
        refused = http.post("/api/pull", json=pull | {"password": "x"})
        assert (refused.status_code, refused.json()["code"]) == (400, "unsupported_field")
        chat = {"model": "tiny", "messages": QUESTION, "options": {}}
        assert http.post("/api/chat", json=chat).text.splitlines()[-1].endswith("}")


def test_a_pull_may_name_its_model(daemon: FakeDaemon, tiny_store: Path) -> None:
    source = Catalog(tiny_store).get("tiny").source
    with daemon.client() as http:
        body = {"model": source, "listed_as": "other", "stream": False}
        assert http.post("/api/pull", json=body).json() == {"status": "success", "model": "other"}
        assert http.request("DELETE", "/api/delete", json={"model": "other"}).status_code == 200
