import os
from pathlib import Path

from flashtensors.server.log_file import rotate_log


def test_a_log_is_set_aside_when_it_is_full_and_writers_go_on(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        assert not rotate_log(path, 100)
        writer.write(b"b")
        assert rotate_log(path, 100)
        writer.write(b"c")
    assert path.read_bytes() == b"c"
    assert (tmp_path / "daemon.log.1").read_bytes() == b"a" * 100 + b"b"
    assert sorted(os.listdir(tmp_path)) == ["daemon.log", "daemon.log.1"]


def test_a_daemon_in_a_terminal_has_no_log(tmp_path: Path) -> None:
    assert not rotate_log(tmp_path / "daemon.log")
