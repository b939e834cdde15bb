"""Starting, finding and stopping the daemon from another process. Imports neither torch nor the HTTP server.

The daemon holds a lock on `daemon.lock` in the store for as long as it lives, and says in `daemon.json` where it
listens; the kernel releases the lock whatever ends the process, so a stale file is never believed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from ..checkpoint.durable import disk_errors
from ..config import Settings
from ..errors import DaemonError

START_TIMEOUT_S = 60.0
"""How long a daemon may take until it listens."""
_POLL_S = 0.02


class DaemonInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that runs."""

    pid: int
    host: str
    port: int
    started_unix_s: float
    version: str

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


class StartReport(msgspec.Struct, frozen=True, kw_only=True):
    """The one line that a starting daemon writes to its standard output."""

    info: DaemonInfo | None = None
    error: str | None = None


def lock_path(store: Path) -> Path:
    """The file that a running daemon keeps locked."""
    return store / "daemon.lock"


def info_path(store: Path) -> Path:
    """The file that says where the daemon listens."""
    return store / "daemon.json"


def log_path(store: Path) -> Path:
    """The daemon's log."""
    return store / "logs" / "daemon.log"


@contextlib.contextmanager
def hold_daemon_lock(store: Path) -> Iterator[None]:
    """Be the one daemon of this store; raises `DaemonError` when there is another."""
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    with lock_path(store).open("ab") as file:
        # Whoever looks for a daemon takes the lock for an instant, so one refusal proves nothing.
        for _ in range(50):
            if _try_lock(file, fcntl.LOCK_EX):
                break
            time.sleep(_POLL_S)
        else:
            raise DaemonError(f"a daemon for {store} runs already; see flash status, or stop it with flash stop")
        info_path(store).unlink(missing_ok=True)  # of a daemon that was killed
        try:
            yield
        finally:
            info_path(store).unlink(missing_ok=True)


def write_info(store: Path, info: DaemonInfo) -> None:
    """Publish where the daemon listens; only the holder of the lock may."""
    partial = info_path(store).with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(info))
    partial.replace(info_path(store))


def find_daemon(settings: Settings) -> DaemonInfo | None:
    """The daemon of this store, or None when none runs."""
    if not _is_locked(settings.store):
        return None
    try:
        with disk_errors(info_path(settings.store)), contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode(info_path(settings.store).read_bytes(), type=DaemonInfo)
    except msgspec.DecodeError:
        pass
    return None  # it does not listen yet


def await_daemon(settings: Settings, *, timeout_s: float = START_TIMEOUT_S) -> DaemonInfo | None:
    """The daemon of this store once it listens; None when nobody runs or starts one, or it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while (info := find_daemon(settings)) is None:
        if time.monotonic() > deadline_s or not _is_locked(settings.store):
            return None
        time.sleep(_POLL_S)
    return info


def start_daemon(settings: Settings, *, timeout_s: float = START_TIMEOUT_S) -> DaemonInfo:
    """Start a daemon that outlives this process, and wait until it listens.

    Raises:
        ConfigError: These settings would leave it open to the network without a key.
        StoreError: The store cannot be written.
        DaemonError: One runs already, or this one did not come up; the message says why.
    """
    settings.check_exposure()
    running = find_daemon(settings)
    if running is not None:
        raise DaemonError(f"a daemon runs already: pid {running.pid} at {running.url}")
    with _open_log(settings.store) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flashtensors.server.daemon", "--detach"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None, "asked for as PIPE"
    assert process.stdout is not None, "asked for as PIPE"
    with process.stdin, process.stdout:
        with contextlib.suppress(BrokenPipeError):  # it died already; its report or its log says why
            process.stdin.write(msgspec.json.encode(settings))
            process.stdin.close()
        report = _read_report(process.stdout, timeout_s)
    if report is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()  # it has forked by now; the daemon is its child, in the session that bears its id
    if report is not None and report.info is not None:
        return report.info
    why = report.error if report is not None and report.error else f"see {log_path(settings.store)}"
    raise DaemonError(f"the daemon did not start: {why}")


def stop_daemon(settings: Settings) -> DaemonInfo | None:
    """Ask the daemon to finish its requests and stop, and wait until it is gone; None when none ran.

    Raises:
        DaemonError: It is still there long after `shutdown_timeout_s`.
    """
    info = find_daemon(settings)
    if info is None:
        return None
    os.kill(info.pid, signal.SIGTERM)
    deadline_s = time.monotonic() + settings.shutdown_timeout_s + 30.0
    while time.monotonic() < deadline_s:
        current = find_daemon(settings)
        if current is None or current.pid != info.pid:
            return info
        time.sleep(_POLL_S)
    raise DaemonError(f"the daemon (pid {info.pid}) has not stopped; see {log_path(settings.store)}, or kill it")


def _open_log(store: Path) -> IO[bytes]:
    path = log_path(store)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path.open("ab")


def _is_locked(store: Path) -> bool:
    """Whether a daemon of this store lives; it may not listen yet."""
    path = lock_path(store)
    with disk_errors(path), contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return not _try_lock(file, fcntl.LOCK_SH)
    return False


def _try_lock(file: IO[bytes], operation: int) -> bool:
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_report(stdout: IO[bytes], timeout_s: float) -> StartReport | None:
    """The daemon's line; None when it ended or stayed silent."""

    readable, _, _ = select.select([stdout], [], [], timeout_s)
    line = stdout.readline() if readable else b""
    return msgspec.json.decode(line, type=StartReport) if line else None
