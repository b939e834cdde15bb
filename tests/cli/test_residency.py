"""What `flash ps` and `flash load` print, from the daemon's answers."""

from collections.abc import Mapping

import msgspec
import pytest

from flashtensors.cli import residency
from flashtensors.cli.main import run_command_line
from flashtensors.server.client import DaemonClient

STATE = {
    "models": [
        {
            "name": "chat", "weight_bytes": 16_400_000_000, "kv_cache_bytes": 2_000_000_000, "num_running": 3,
            "expires_at": "2318-01-01T00:00:00Z", "is_pinned": True, "host_bytes": 4_100_000_000,
            "image_bytes": 16_400_000_000, "state": "ready",
        }
    ],
    "host": [
        {
            "model": "code", "tier": "host", "state": "absent", "host_bytes": 10, "image_bytes": 10,
            "kept_kv_bytes": 500_000_000, "num_parked": 2,
        }
    ],
    "loading": [
        {
            "model": "new", "phase": "read", "completed": 1_200_000_000, "total": 16_400_000_000,
            "bytes_per_s": 2.4e9,
        },
        {
            "model": "newer", "phase": "read", "completed": 0, "total": 16_400_000_000, "bytes_per_s": None,
        }
    ],
    "worker": {
        "device": "cuda:0", "device_name": "NVIDIA H200", "free_bytes": 90_000_000_000,
        "total_bytes": 112_000_000_000, "host_bytes": 60_000_000_000, "host_free_bytes": 40_000_000_000,
        "link_bytes_per_s": 54.5e9, "disk_bytes_per_s": 3.1e9,
    },
}  # fmt: skip


class FakeClient:
    """A daemon that knows one answer to each question."""

    def __init__(self, last: dict[str, object]) -> None:
        self.last = last
        self.state: Mapping[str, object] = STATE
        self.bodies: list[object] = []

    def get(self, path: str) -> object:
        assert path == "/api/ps"
        return self.state

    def stream(self, path: str, body: object):
        self.bodies.append(body)
        yield {"status": "read", "completed": 4_100_000_000, "total": 16_400_000_000, "bytes_per_s": 41e9}
        yield self.last


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient({})
    monkeypatch.setattr(DaemonClient, "connect", lambda settings: fake)
    monkeypatch.setattr(DaemonClient, "connect_or_start", lambda settings: fake)
    return fake


def test_ps_shows_tiers_bytes_pins_and_progress(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["ps"]) == 0
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert rows[1] == ["chat", "ready", "device", "25%", "16.4", "GB", "2.0", "GB", "3", "0", "pinned"]
    assert rows[2] == ["code", "-", "host", "100%", "10", "B", "500.0", "MB", "kept", "2"]
    assert [row[:3] for row in rows[3:]] == [["new", "loading", "disk"], ["newer", "loading", "disk"]]
    lines = printed.out.splitlines()
    assert lines[3].endswith("read 1.2 GB of 16.4 GB, 2.4 GB/s")
    assert lines[4].endswith("read 0 B of 16.4 GB")
    assert "NVIDIA H200: 90.0 GB of 112.0 GB free" in printed.err
    assert "host memory: 40.0 GB of 60.0 GB free" in printed.err
    assert "loads lately: 54.5 GB/s from host memory, 3.1 GB/s from disk" in printed.err


@pytest.mark.parametrize(
    ("link", "disk", "line"),
    [
        (None, None, None),
        (None, 3.1e9, "loads lately: 3.1 GB/s from disk"),
        (54.5e9, None, "loads lately: 54.5 GB/s from host memory"),
    ],
)
def test_ps_shows_only_rates_that_were_measured(
    client: FakeClient, capsys: pytest.CaptureFixture[str], link: float | None, disk: float | None, line: str | None
) -> None:
    worker = {"host_bytes": 60, "host_free_bytes": 40, "link_bytes_per_s": link, "disk_bytes_per_s": disk}
    client.state = STATE | {"worker": worker}
    assert run_command_line(["ps"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["host memory: 40 B of 60 B free"] + ([] if line is None else [line])


def test_load_says_how_far_and_how_fast_it_was(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.last = {"status": "success", "was_loaded": False, "size": 16_400_000_000, "load_duration": 400_000_000}
    assert run_command_line(["load", "chat"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "loaded chat: 16.4 GB in 0.40 s (41.0 GB/s)\n"
    assert printed.err == "chat: read 4.1 GB of 16.4 GB, 41.0 GB/s\n"


def test_load_brings_a_model_to_host_memory_only(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.last = {"status": "success", "host_bytes": 8_000_000_000, "image_bytes": 16_000_000_000}
    assert run_command_line(["load", "chat", "--tier", "host"]) == 0
    assert capsys.readouterr().out == "chat: 8.0 GB of 16.0 GB are in host memory\n"
    assert client.bodies == [{"model": "chat", "is_pinned": False, "tier": "host"}]
    assert run_command_line(["load", "chat", "--tier", "host", "--pin"]) == 2


def test_ps_prints_what_the_daemon_said(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["ps", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out) == STATE


def test_shares_of_unknown_sizes_are_not_shown() -> None:
    assert residency.share_text(5, 0) == ""
    assert residency.share_text(5, 20) == "25%"
