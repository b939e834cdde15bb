"""A daemon whose worker is killed at every stage of a load: who asked is told, and the next request is answered.

Where the daemon owns the host tier's memory, the next worker finds the model there and opens no file.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.config import Settings
from flashtensors.llm import LLM
from flashtensors.request import SamplingParams
from flashtensors.server.launch import start_daemon, stop_daemon
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

REQUEST: dict[str, Any] = {
    "model": "tiny",
    "prompt": "hello there",
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
}
START_TIMEOUT_S = 60.0


def stages(quick: str, slow: Iterable[str]) -> list[object]:
    """Stages to die at; a worker's start takes seconds, so all but one are slow."""
    return [quick, *(pytest.param(stage, marks=pytest.mark.slow) for stage in slow)]


@dataclass
class CrashingDaemon:
    """A daemon process with a worker that dies where it is told to."""

    http: httpx.Client
    crash_at: Path

    def ask(self) -> httpx.Response:
        return self.http.post("/v1/completions", json=REQUEST)

    def answer(self) -> str:
        """The text of an answer that must come, and be complete; all bytes of the model are there then."""
        answer = self.ask()
        self.http.post("/api/load", json={"model": "tiny", "stream": False}).raise_for_status()
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 12
        return answer.json()["choices"][0]["text"]

    def ask_with_death(self, stage: str) -> None:
        """Ask for what the worker dies of at `stage`."""
        self.crash_at.write_text(stage)
        lost = self.ask()
        assert not self.crash_at.exists(), f"the worker never came to {stage!r}"
        assert lost.status_code == 503, lost.text
        message = json.loads(lost.text)["error"]["message"]
        assert "SIGKILL" in message or "signal 9" in message

    def fill_host_memory(self) -> None:
        """Bring all of the model to the host tier."""
        filled = self.http.post("/api/load", json={"model": "tiny", "tier": "host", "stream": False}).json()
        assert filled["host_bytes"] == filled["image_bytes"] > 100_000

    def replace_worker(self) -> None:
        """Kill the worker from outside, and wait for the next one."""
        pid = self._worker()["pid"]
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self._worker().get("pid") in (None, pid):
            assert time.monotonic() < deadline_s, "no worker came"
            time.sleep(0.05)

    def count(self, name: str, **labels: str) -> int:
        """The sum of a counter's samples that have these labels."""
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        lines = [
            line for line in self.http.get("/metrics").text.splitlines() if line.startswith(f"flashtensors_{name}")
        ]
        return sum(int(float(line.split()[-1])) for line in lines if all(label in line for label in wanted))

    def _worker(self) -> dict[str, Any]:
        return self.http.get("/api/ps").json()["worker"]


def answer_of(folder: Path) -> str:
    """What the model in a folder says to the request, in this process."""
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(folder, device="cpu", kv_cache_size=4 << 20) as llm:
        return llm.generate(REQUEST["prompt"], sampling)[0].outputs[0].text


@contextmanager
def run_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[CrashingDaemon]:
    """A daemon with a tiny model in its store, and workers that die."""
    root, crash_at = Path(__file__).parents[2], tmp_path / "crash-at"
    monkeypatch.setenv("CRASH_AT", str(crash_at))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'crash_site'}:{root}")
    write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    write_tiny_tokenizer(tmp_path / "tiny")
    pull(Catalog(tmp_path / "store"), str(tmp_path / "tiny"))
    chosen = {"storage_path": str(tmp_path / "store"), "server_port": 0, "kv_cache_size": 4 << 20, **settings}
    info = start_daemon(Settings(**chosen))
    try:
        with httpx.Client(base_url=info.url, timeout=120) as http:
            yield CrashingDaemon(http, crash_at)
    finally:
        stop_daemon(Settings(**chosen))


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CrashingDaemon]:
    """Weights are used where they lie in their files."""
    with run_daemon(tmp_path, monkeypatch, device="cpu") as daemon:
        yield daemon


@pytest.fixture
def docked_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CrashingDaemon]:
    """Weights go from a host tier, in a memory file of the daemon, to docks: what a GPU has, in host memory."""
    monkeypatch.setenv("CRASH_DOCKED", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Digests need pages of 16 MiB; those of these docks are smaller than the model.
    with run_daemon(tmp_path, monkeypatch, mem_pool_size=64 << 20, verify_digests=False) as daemon:
        yield daemon


BARE = stages("reading", ["planning", "planned", "admitted", "prepared", "ready", "landed", "first step", "step 5"])
HOT = stages(
    "copying", ["planning", "planned", "noting", "admitted", "prepared", "ready", "landed", "first step", "step 5"]
)


@pytest.mark.parametrize("stage", BARE)
def test_a_worker_that_is_killed_comes_back_and_answers(daemon: CrashingDaemon, stage: str) -> None:
    daemon.ask_with_death(stage)
    assert daemon.answer() == daemon.answer() != ""
    assert daemon.count("worker_restarts_total") == 1


@pytest.mark.parametrize("stage", HOT)
def test_a_worker_that_is_killed_leaves_the_model_in_host_memory(docked_daemon: CrashingDaemon, stage: str) -> None:
    daemon = docked_daemon
    daemon.fill_host_memory()
    expected = daemon.answer()
    daemon.replace_worker()
    daemon.ask_with_death(stage)
    num_hot = daemon.count("model_loads_total", source="host")
    assert daemon.answer() == daemon.answer() == expected
    assert daemon.count("model_loads_total", source="host") == num_hot + 1
    assert daemon.count("model_load_bytes_total", source="disk") == 0, "a file was read again"
    assert daemon.count("model_load_bytes_total", source="host") > 100_000
    assert daemon.count("worker_restarts_total") == 2


@pytest.mark.parametrize("stage", stages("reading", ["planned", "noting", "copying", "ready"]))
def test_a_first_load_that_is_killed_leaves_nothing_that_is_wrong(
    docked_daemon: CrashingDaemon, tmp_path: Path, stage: str
) -> None:
    daemon = docked_daemon
    daemon.ask_with_death(stage)
    expected = answer_of(tmp_path / "tiny")
    assert daemon.answer() == expected
    assert daemon.count("model_load_bytes_total", source="disk") > 100_000, "no note names what was read before"
    daemon.replace_worker()
    assert daemon.answer() == expected
    assert daemon.count("model_load_bytes_total", source="host") > 100_000
