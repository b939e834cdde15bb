"""A daemon whose worker is killed at every stage of a load: who asked is told, and the next request is answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.config import Settings
from flashtensors.server.launch import start_daemon, stop_daemon
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

QUICK = ["reading"]
SLOW = ["planning", "planned", "admitted", "building", "loaded", "first step", "step 5"]
STAGES = [*QUICK, *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW)]
REQUEST = {"model": "tiny", "prompt": "hello there", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@dataclass
class CrashingDaemon:
    """A daemon process with a worker that dies where it is told to."""

    http: httpx.Client
    crash_at: Path

    def ask(self) -> httpx.Response:
        return self.http.post("/v1/completions", json=REQUEST)

    def ask_with_death(self, stage: str) -> httpx.Response:
        self.crash_at.write_text(stage)
        return self.ask()

    def num_restarts(self) -> int:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(
            int(float(line.split()[-1])) for line in lines if line.startswith("flashtensors_worker_restarts_total")
        )


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CrashingDaemon]:
    root, crash_at = Path(__file__).parents[2], tmp_path / "crash-at"
    monkeypatch.setenv("CRASH_AT", str(crash_at))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'crash_site'}:{root}")
    write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    write_tiny_tokenizer(tmp_path / "tiny")
    pull(Catalog(tmp_path / "store"), str(tmp_path / "tiny"))
    settings = Settings(storage_path=str(tmp_path / "store"), server_port=0, device="cpu", kv_cache_size=4 << 20)
    info = start_daemon(settings)
    try:
        with httpx.Client(base_url=info.url, timeout=120) as http:
            yield CrashingDaemon(http, crash_at)
    finally:
        stop_daemon(settings)


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_that_is_killed_comes_back_and_answers(daemon: CrashingDaemon, stage: str) -> None:
    lost = daemon.ask_with_death(stage)
    assert not daemon.crash_at.exists(), f"the worker never came to {stage!r}"
    assert lost.status_code == 503, lost.text
    error = json.loads(lost.text)["error"]
    assert "SIGKILL" in error["message"] or "signal 9" in error["message"]
    first, second = daemon.ask(), daemon.ask()
    assert first.status_code == second.status_code == 200, first.text
    assert first.json()["choices"][0]["text"] == second.json()["choices"][0]["text"] != ""
    assert first.json()["usage"]["completion_tokens"] == 12
    assert daemon.num_restarts() == 1
