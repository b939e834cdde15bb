"""What every test runs under: one thread, fixed seeds, and no way to other machines unless it is marked slow."""

import os
import random
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; also for processes that tests start
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: it decides as it decorates

settings.register_profile("flashtensors", derandomize=True, deadline=None)
settings.load_profile("flashtensors")

_LOCAL_HOSTS = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers in every run, whatever ran before."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines; tests marked slow may download."""
    if request.node.get_closest_marker("slow") is None:
        connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo
        monkeypatch.setattr(socket.socket, "connect", lambda self, at: connect(self, _local(at)))
        monkeypatch.setattr(socket.socket, "connect_ex", lambda self, at: connect_ex(self, _local(at)))
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *args, **kwargs: getaddrinfo(_local_host(host), *args, **kwargs)
        )


def _local(address: Any) -> Any:
    if isinstance(address, tuple):  # a path is a socket of this machine
        _local_host(address[0])
    return address


def _local_host(host: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    if name and not str(name).startswith(_LOCAL_HOSTS):
        raise ConnectionRefusedError(f"a test that is not marked slow tried to reach {name}")
    return host


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """An empty folder for a store."""
    folder = tmp_path / "store"
    folder.mkdir()
    return folder
