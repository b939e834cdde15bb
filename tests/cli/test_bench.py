"""`flash bench` against a daemon process and against models on disk, on the CPU."""

import asyncio
import itertools
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.cli import bench_throughput, timed_requests
from flashtensors.cli.bench_load import limit_of
from flashtensors.cli.bench_swap import SwapReport, find_swap, print_swaps
from flashtensors.cli.bench_throughput import made_up_prompts
from flashtensors.cli.main import run_command_line
from flashtensors.cli.timed_requests import TimedAnswer, TimedClient, percentile
from flashtensors.config import Settings
from flashtensors.errors import CapacityError, DaemonError, FlashError
from flashtensors.server.launch import DaemonInfo
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.transfer.readers.page_cache import PageCache
from flashtensors.worker.load_trials import MachineLimits, cached_share


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
        limits, swaps = report["limits"], report["swaps"]
        assert len(swaps) == 2
        for swap in swaps:
            num_bytes = sum(swap["bytes_by_tier"].values())
            assert 100_000 < num_bytes < 10_000_000, "of one load"
            assert 0 < swap["seconds"] == sum(swap["phase_seconds"].values()) - swap["phase_seconds"]["first_token"]
            assert swap["first_token_s"] <= report["first_token_max_s"]
            assert num_bytes / max(limits["copy"], limits["page_cache"]) <= swap["floor_s"]
            assert swap["times_floor"] == swap["seconds"] / swap["floor_s"]
            assert swap["over_floor_s"] == swap["seconds"] - swap["floor_s"]
    shown(capsys, "swap", "one", "one", code=2)


def test_swaps_are_shown_beside_their_floor(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = shown(capsys, "swap", "one", "two", "--rounds", "2").split("\n\n")
    assert first.splitlines()[0].split("  ")[0] == "MODEL"
    for line, model in zip(first.splitlines()[1:], ("one", "one", "two", "two"), strict=True):
        assert re.match(rf"{model} .*[kM]B .* \d+ ms +\d+ ms +[\d.]+x, [+-]\d+ ms +\d+ ms +.*read \d+ ms", line), line
    assert re.match(r"MODEL +SWAPS +FIRST TOKEN +WORST +FLOOR +TIME +OVER\n", second)
    assert [line.split()[:2] for line in second.splitlines()[1:]] == [["one", "2"], ["two", "2"]]


def test_models_that_fit_beside_each_other_do_not_swap(capsys: pytest.CaptureFixture[str]) -> None:
    reports = msgspec.json.decode(shown(capsys, "swap", "one", "two", "--rounds", "2", "--keep", "--json"))
    assert [(report["num_swaps"], report["swaps"]) for report in reports] == [(0, []), (0, [])]
    table = shown(capsys, "swap", "one", "two", "--rounds", "1", "--keep")
    assert table.startswith("MODEL  SWAPS  FIRST TOKEN")
    assert all(report["first_token_p50_s"] > 0 for report in reports)


def metrics_of(num_loads: int, **phase_seconds: float) -> dict[str, dict[tuple[str, ...], float]]:
    """What the daemon counts after loads of 40 GB from host memory and 12 GB from files each."""
    return {
        "flashtensors_model_loads_total": {("m", "disk"): num_loads, ("other", "disk"): 9 * num_loads},
        "flashtensors_model_load_bytes_total": {
            ("m", "host"): num_loads * 40e9,
            ("m", "disk"): num_loads * 12e9,
            ("other", "disk"): num_loads * 7e9,
        },
        "flashtensors_model_load_seconds_total": {
            ("m", phase): num_loads * seconds for phase, seconds in phase_seconds.items()
        },
    }


@pytest.mark.parametrize(
    ("limits", "cached_share", "floor_s"),
    [
        (MachineLimits(copy=52e9, page_cache=30e9, disk=3e9), 0.0, 4.0),
        (MachineLimits(copy=52e9, page_cache=30e9, disk=3e9), None, 4.0),
        (MachineLimits(copy=52e9, page_cache=30e9, disk=3e9), 0.5, 2.0),
        (MachineLimits(copy=52e9, page_cache=30e9, disk=3e9), 1.0, 1.0),
        (MachineLimits(copy=52e9, page_cache=6e9, disk=3e9), 1.0, 2.0),
        (MachineLimits(copy=26e9, page_cache=30e9, disk=None), 1.0, 2.0),
        (MachineLimits(copy=52e9, page_cache=30e9, disk=None), 0.5, None),
    ],
)
def test_a_swap_is_held_against_the_slowest_of_what_its_bytes_need(
    limits: MachineLimits, cached_share: float | None, floor_s: float | None
) -> None:
    before, after = (metrics_of(count, queue=0.5, read=2.0, copy=3.5, first_token=0.25) for count in (3, 4))
    swap = find_swap("m", before, after, 5.0, limits, cached_share)
    assert swap is not None
    cached_bytes = round(12e9 * (cached_share or 0.0))
    assert swap.bytes_by_tier == {
        "host memory": 40 * 10**9,
        "page cache": cached_bytes,
        "disk": 12 * 10**9 - cached_bytes,
    }
    assert (swap.seconds, swap.floor_s) == (6.0, floor_s)
    if floor_s is None:
        assert (swap.times_floor, swap.over_floor_s) == (None, None)
    else:
        assert (swap.times_floor, swap.over_floor_s) == (6.0 / floor_s, 6.0 - floor_s)
    assert find_swap("m", before, before, 5.0, limits, cached_share) is None


def test_a_swap_without_a_known_floor_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    limits = MachineLimits(copy=50e9, page_cache=30e9, disk=None)
    swap = find_swap("m", {}, metrics_of(1, read=2.0), 1.5, limits, 0.0)
    assert swap is not None
    print_swaps(
        [SwapReport(model="m", num_swaps=1, first_token_p50_s=1.5, first_token_max_s=1.5, limits=limits, swaps=[swap])]
    )
    line = capsys.readouterr().out.splitlines()[1]
    assert re.split(r"  +", line) == [
        "m", "52.0 GB", "40.0 GB host memory, 12.0 GB disk", "unknown", "2000 ms", "1500 ms", "read 2000 ms",
    ]  # fmt: skip


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


def test_files_count_by_their_size_in_what_the_page_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached_share(tmp_path) == 0.0
    for name, num_bytes in (("a.safetensors", 100), ("b.safetensors", 300), ("tokenizer.json", 1000)):
        (tmp_path / name).write_bytes(bytes(num_bytes))
    assert cached_share(tmp_path) in (1.0, None), "they were just written"
    monkeypatch.setattr(PageCache, "find_share", lambda self, fd, offset, num_bytes: {100: 1.0, 300: 0.5}[num_bytes])
    assert cached_share(tmp_path) == 250 / 400
    monkeypatch.setattr(PageCache, "find_share", lambda self, fd, offset, num_bytes: None)
    assert cached_share(tmp_path) is None


def test_made_up_prompts_are_the_same_in_every_run() -> None:
    prompts = list(made_up_prompts(3, 7, 100))
    assert prompts == list(made_up_prompts(3, 7, 100))
    assert [len(prompt) for prompt in prompts] == [7, 7, 7]
    assert all(0 <= token_id < 100 for prompt in prompts for token_id in prompt)
    assert list(made_up_prompts(1, 3, 1)) == [[0, 0, 0]]


def test_percentiles() -> None:
    assert [percentile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 2.0, 3.0, 3.0]


Reply = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


def ask_for_answers(replies: Iterator[Reply | None], count: int) -> list[TimedAnswer]:
    """What a client makes of a server's replies; None: the connection is closed without one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            reply = next(replies)
            if reply is not None:
                status, headers, body = reply
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    async def ask(port: int) -> list[TimedAnswer]:
        info = DaemonInfo(pid=1, host="127.0.0.1", port=port, started_unix_s=0.0, version="0")
        async with TimedClient(info, Settings(), num_at_once=2) as client:
            return [answer async for answer in client.answers([{"model": "m"}] * count)]

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # the client left: that is the case

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            return asyncio.run(ask(server.server_port))
        finally:
            server.shutdown()
            thread.join()


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
    with pytest.raises(error):
        ask_for_answers(itertools.repeat(None if status is None else (status, {}, body)), 3)


FULL: Reply = (503, {"retry-after": "1"}, b'{"error": {"message": "try later", "code": "over_capacity"}}')
ANSWERED: Reply = (
    200,
    {},
    b'data: {"choices":[]}\n\ndata: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1,'
    b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n',
)


def test_an_answer_that_finds_no_room_is_asked_for_again_and_its_wait_counts() -> None:
    answers = ask_for_answers(iter([ANSWERED, FULL, ANSWERED, FULL, ANSWERED]), 3)
    waits_s = sorted(answer.first_token_s for answer in answers)
    assert waits_s[0] < 1 <= waits_s[-1] <= max(answer.total_s for answer in answers)


def test_a_daemon_that_has_no_room_and_answers_nobody_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_requests, "PATIENCE_S", 1.5)
    with pytest.raises(CapacityError, match="try later"):
        ask_for_answers(itertools.repeat(FULL), 3)
