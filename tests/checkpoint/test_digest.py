import hashlib
import os
import threading
from pathlib import Path

import pytest

from flashtensors.checkpoint.digest import hash_file, hash_files
from flashtensors.errors import StoreError


@pytest.mark.parametrize("num_bytes", [0, 1, 4 * 1024**2, 4 * 1024**2 + 1, 9_000_001])
def test_digests_are_those_of_the_bytes(tmp_path: Path, num_bytes: int) -> None:
    data = os.urandom(num_bytes)
    (tmp_path / "file").write_bytes(data)
    seen: list[int] = []
    assert hash_file(tmp_path / "file", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == num_bytes


def test_many_files_keep_their_order_and_count_their_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / str(index) for index in range(20)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * (index * 1000))
    lock, seen = threading.Lock(), [0]

    def count(num_bytes: int) -> None:
        with lock:
            seen[0] += num_bytes

    assert hash_files(paths, count) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert seen[0] == sum(path.stat().st_size for path in paths)
    assert hash_files([]) == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"x")
    with pytest.raises(StoreError, match="absent: cannot be read"):
        hash_files([tmp_path / "there", tmp_path / "absent"])


def test_synced_hashing_makes_the_file_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    hash_file(tmp_path / "file")
    assert synced == []
    hash_file(tmp_path / "file", is_synced=True)
    assert synced == [str(tmp_path / "file")]
