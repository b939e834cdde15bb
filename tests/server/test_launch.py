"""Starting, finding and stopping a daemon process. Its worker is not waited for: it has tests of its own."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from flashtensors.config import Settings
from flashtensors.errors import ConfigError, DaemonError, StoreError
from flashtensors.server import launch
from flashtensors.server.client import DaemonClient
from flashtensors.server.launch import DaemonInfo, find_daemon, start_daemon, stop_daemon


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s"
        time.sleep(0.01)


def processes_of(store: Path) -> list[int]:
    """Processes that have this store in their environment: the daemon and whatever it started."""
    mark = f"FLASH_TEST_STORE={store}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it ended while we looked
    return found


@pytest.fixture
def settings(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    monkeypatch.setenv("FLASH_TEST_STORE", str(store))
    settings = Settings(storage_path=str(store), server_port=0, device="cpu", shutdown_timeout_s=5)
    yield settings
    stop_daemon(settings)
    until(lambda: processes_of(store) == [])


def test_a_daemon_runs_until_it_is_stopped(settings: Settings) -> None:
    assert find_daemon(settings) is None
    info = start_daemon(settings)
    assert find_daemon(settings) == info
    assert httpx.get(f"{info.url}/health").status_code == 200
    assert DaemonClient.connect(settings).get("/api/version") == {"version": info.version}
    with pytest.raises(DaemonError, match=f"runs already: pid {info.pid}"):
        start_daemon(settings)
    assert stop_daemon(settings) == info
    assert find_daemon(settings) is None
    assert stop_daemon(settings) is None


def test_all_who_want_a_daemon_at_once_get_the_same(settings: Settings) -> None:
    with ThreadPoolExecutor(4) as threads:
        clients = list(threads.map(lambda _: DaemonClient.connect_or_start(settings), range(4)))
    assert {client.info for client in clients} == {find_daemon(settings)}


def test_a_store_that_cannot_be_written_is_said(settings: Settings, store: Path) -> None:
    (store / "logs").write_text("in the way")
    with pytest.raises(StoreError, match="logs"):
        start_daemon(settings)


def test_nothing_is_left_when_the_daemon_is_killed(settings: Settings, store: Path) -> None:
    info = start_daemon(settings)
    until(lambda: len(processes_of(store)) >= 2)  # the worker as well
    os.kill(info.pid, signal.SIGKILL)
    until(lambda: processes_of(store) == [])
    assert find_daemon(settings) is None
    assert start_daemon(settings).pid != info.pid


def test_a_stale_file_is_not_believed(settings: Settings, store: Path) -> None:
    launch.lock_path(store).touch()
    launch.write_info(store, DaemonInfo(pid=1, host="127.0.0.1", port=1, started_unix_s=0, version="0"))
    assert find_daemon(settings) is None
    launch.info_path(store).write_text("{")
    assert find_daemon(settings) is None


def test_a_port_in_use_is_said(settings: Settings, store: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = Settings(storage_path=str(store), server_port=other.getsockname()[1], device="cpu")
        with pytest.raises(DaemonError, match="Address already in use; stop what uses it, or set server_port"):
            start_daemon(taken)
    assert find_daemon(settings) is None


def test_an_open_daemon_wants_a_key(store: Path) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        start_daemon(Settings(storage_path=str(store), server_host="0.0.0.0", server_port=0))


def test_secrets_are_neither_in_arguments_nor_in_the_log(settings: Settings, store: Path) -> None:
    secret = "a-key-that-is-looked-for"
    info = start_daemon(Settings(storage_path=str(store), server_port=0, device="cpu", api_key=secret))
    for process in processes_of(store):
        assert secret.encode() not in Path(f"/proc/{process}/cmdline").read_bytes()
    assert httpx.get(f"{info.url}/v1/models").status_code == 401
    client = DaemonClient(info, secret)
    assert client.get("/v1/models")["data"] == []
    assert secret not in launch.log_path(store).read_text()
    assert secret not in launch.info_path(store).read_text()
