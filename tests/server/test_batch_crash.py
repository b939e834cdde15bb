"""A batch across the death of its daemon: a real daemon process, a real worker, a tiny random model."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flashtensors.config import Settings
from flashtensors.server.launch import DaemonInfo, find_daemon, start_daemon, stop_daemon

NUM_LINES = 60
URL = "/v1/completions"


@pytest.fixture
def settings(tmp_path: Path, tiny_store: Path) -> Iterator[Settings]:
    (tmp_path / "catalog").symlink_to(tiny_store / "catalog")
    settings = Settings(
        storage_path=str(tmp_path), server_port=0, device="cpu", kv_cache_size=4 << 20, max_num_seqs=2, max_queue=4
    )
    yield settings
    stop_daemon(settings)


def body(number: int) -> dict[str, object]:
    model = ("tiny", "plain")[number % 2]
    return {"model": model, "prompt": f"number {number}", "temperature": 0, "max_tokens": 8, "ignore_eos": True}


def batch_of(http: httpx.Client, batch_id: str) -> dict:
    return http.get(f"/v1/batches/{batch_id}").raise_for_status().json()


def start(settings: Settings) -> tuple[DaemonInfo, httpx.Client]:
    info = start_daemon(settings)
    return info, httpx.Client(base_url=info.url, timeout=60)


def wait_until(http: httpx.Client, batch_id: str, num_completed: int) -> dict:
    for _ in range(6000):
        batch = batch_of(http, batch_id)
        if batch["request_counts"]["completed"] >= num_completed and batch["status"] in ("in_progress", "completed"):
            return batch
        threading.Event().wait(0.01)
    raise AssertionError(batch)


def test_a_killed_daemon_leaves_a_batch_that_the_next_one_finishes(settings: Settings) -> None:
    lines = [
        json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": URL, "body": body(n)}) for n in range(NUM_LINES)
    ]
    info, http = start(settings)
    file = http.post("/v1/files", files={"file": "\n".join(lines)}, data={"purpose": "batch"}).raise_for_status().json()
    fields = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
    batch_id = http.post("/v1/batches", json=fields).raise_for_status().json()["id"]
    for num_completed in (5, 25):
        assert wait_until(http, batch_id, num_completed)["status"] == "in_progress"
        http.post(URL, json=body(1)).raise_for_status()  # goes before all that wait
        assert batch_of(http, batch_id)["request_counts"]["completed"] < NUM_LINES
        num_seen = batch_of(http, batch_id)["request_counts"]["completed"]
        http.close()
        os.kill(info.pid, signal.SIGKILL)
        while find_daemon(settings) is not None:
            threading.Event().wait(0.01)
        info, http = start(settings)
        counts = httpx.get(f"{info.url}/v1/batches/{batch_id}").json()["request_counts"]
        assert counts["completed"] >= num_seen, "as soon as anybody can ask"
    with http:
        for _ in range(6000):
            batch = batch_of(http, batch_id)
            if batch["status"] == "completed":
                break
            threading.Event().wait(0.01)
        assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        text = http.get(f"/v1/files/{batch['output_file_id']}/content").text
        entries = [json.loads(line) for line in text.splitlines()]
        assert sorted(entry["custom_id"] for entry in entries) == sorted(f"id-{n}" for n in range(NUM_LINES))
        alone = {n: http.post(URL, json=body(n)).json()["choices"] for n in (0, 1, 30, 59)}
        answers = {entry["custom_id"]: entry["response"]["body"]["choices"] for entry in entries}
        assert {n: answers[f"id-{n}"] for n in alone} == alone
