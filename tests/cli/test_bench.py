"""`flash bench` against a daemon process and against models on disk, on the CPU."""

import asyncio
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.cli import bench_throughput
from flashtensors.cli.bench_load import limit_of
from flashtensors.cli.bench_throughput import made_up_prompts
from flashtensors.cli.main import run_command_line
from flashtensors.cli.timed_requests import TimedClient, percentile
from flashtensors.config import Settings
from flashtensors.errors import DaemonError, FlashError
from flashtensors.server.launch import DaemonInfo
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.worker.load_trials import MachineLimits


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bench")
    for name in ("one", "two"):
        write_tiny_checkpoint(folder / name, tiny_config("llama"))
        write_tiny_tokenizer(folder / name)
        pull(Catalog(folder / "store"), str(folder / name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_STORAGE_PATH", str(folder / "store"))
        patch.setenv("FLASH_SERVER_PORT", "0")
        patch.setenv("FLASH_DEVICE", "cpu")
        patch.setenv("FLASH_KV_CACHE_SIZE", "4MiB")
        yield folder / "store"
        assert run_command_line(["stop"]) == 0


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_command_line(["bench", *arguments]) == code
    return capsys.readouterr().out


def test_throughput_counts_every_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = ["--num-prompts", "12", "--input-len", "20", "--output-len", "5"]
    report = msgspec.json.decode(shown(capsys, "throughput", "one", *sizes, "--json"))
    assert report["num_requests"] == 12
    assert round(report["output_tokens_per_s"] * report["seconds"]) == 60
    assert round(report["prompt_tokens_per_s"] * report["seconds"]) == 240
    assert 0 < report["first_token_p50_s"] <= report["first_token_p99_s"] <= report["seconds"]
    (tmp_path / "prompts").write_text("hello\n\nthe end\n")
    table = shown(capsys, "throughput", "one", "--file", str(tmp_path / "prompts"), "--output-len", "2")
    assert "requests        2 in" in table
    (tmp_path / "prompts").write_text("\n")
    shown(capsys, "throughput", "one", "--file", str(tmp_path / "prompts"), code=1)
    shown(capsys, "throughput", "nonesuch", code=4)


def test_a_long_run_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_throughput, "_SAY_EVERY_S", 0.0)
    sizes = ["--num-prompts", "3", "--input-len", "8", "--output-len", "400", "--concurrency", "1"]
    assert run_command_line(["bench", "throughput", "one", *sizes]) == 0
    assert re.search(r"[0-3] of 3 answers after \d+ s, [\d,]+ tokens/s now", capsys.readouterr().err)


def test_swaps_load_each_model_in_every_turn(capsys: pytest.CaptureFixture[str]) -> None:
    reports = msgspec.json.decode(shown(capsys, "swap", "one", "two", "--rounds", "2", "--json"))
    assert [(report["model"], report["num_swaps"]) for report in reports] == [("one", 2), ("two", 2)]
    for report in reports:
        assert 0 < report["first_token_p50_s"] <= report["first_token_max_s"]
        assert sum(report["bytes_by_source"].values()) > 100_000
        assert report["phase_seconds"]
    assert shown(capsys, "swap", "one", "two", "--rounds", "1").startswith("MODEL  SWAPS  FIRST TOKEN")
    shown(capsys, "swap", "one", "one", code=2)


def test_loads_are_held_against_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    report = msgspec.json.decode(shown(capsys, "load", "one", "--runs", "2", "--json"))
    assert [load["tier"] for load in report["loads"]] == ["disk"] * 2 + ["page cache"] * 2
    assert all(load["num_bytes"] > 100_000 and load["seconds"] > 0 for load in report["loads"])
    assert report["limits"]["page_cache"] > 0
    assert "page cache" in shown(capsys, "load", "one", "--runs", "1")


def test_the_limit_of_a_tier_is_its_slowest_link() -> None:
    limits = MachineLimits(copy=50.0, page_cache=30.0, disk=3.0)
    assert [limit_of(tier, limits) for tier in ("disk", "page cache", "host memory")] == [3.0, 30.0, 50.0]
    assert limit_of("disk", MachineLimits(copy=50.0, page_cache=60.0, disk=None)) is None
    assert limit_of("page cache", MachineLimits(copy=50.0, page_cache=60.0, disk=None)) == 50.0


def test_made_up_prompts_are_the_same_in_every_run() -> None:
    prompts = list(made_up_prompts(3, 7, 100))
    assert prompts == list(made_up_prompts(3, 7, 100))
    assert [len(prompt) for prompt in prompts] == [7, 7, 7]
    assert all(0 <= token_id < 100 for prompt in prompts for token_id in prompt)
    assert list(made_up_prompts(1, 3, 1)) == [[0, 0, 0]]


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, b'{"error": {"message": "full"}}', FlashError),
        (200, b'data: {"choices": []}\n\ndata: {"error":{"message":"died"}}\n\n', FlashError),
        (200, b'data: {"choices": []}\n\n', FlashError),
        (None, b"", DaemonError),
    ],
)
def test_an_answer_that_fails_is_an_error_of_the_measurement(
    status: int | None, body: bytes, error: type[FlashError]
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if status is not None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    async def ask(port: int) -> None:
        info = DaemonInfo(pid=1, host="127.0.0.1", port=port, started_unix_s=0.0, version="0")
        async with TimedClient(info, Settings(), num_at_once=2) as client:
            async for _ in client.answers([{"model": "m"}] * 3):
                pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # the client left: that is the case

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(error):
                asyncio.run(ask(server.server_port))
        finally:
            server.shutdown()
            thread.join()
