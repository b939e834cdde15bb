"""Digests of chunks against the xxhash library, and the file that keeps them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import xxhash

from flashtensors.checkpoint import chunk_digests
from flashtensors.checkpoint.chunk_digests import (
    DigestCheck,
    digests_path,
    hash_files,
    read_digests,
    write_digests,
)
from flashtensors.errors import DigestMismatch, StoreError

CHUNK_BYTES = 4096
DATA = random.Random(0).randbytes(3 * CHUNK_BYTES + 100)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_digests, "DIGEST_CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(DATA)
    return path


def test_digests_are_xxh3_of_the_chunks(path: Path):
    of_file = hash_files([path]).files[path.name]
    assert of_file.num_bytes == len(DATA)
    starts = range(0, len(DATA), CHUNK_BYTES)
    assert of_file.xxh3_64 == tuple(xxhash.xxh3_64_intdigest(DATA[at : at + CHUNK_BYTES]) for at in starts)


def test_empty_files_have_no_chunks(tmp_path: Path):
    (tmp_path / "empty").touch()
    assert hash_files([tmp_path / "empty"]).files["empty"].xxh3_64 == ()


def test_several_chunks_at_once_and_their_remainder(path: Path):
    known = hash_files([path])
    check = DigestCheck({path: len(DATA)}, known)
    check.check(path, CHUNK_BYTES, memoryview(DATA)[CHUNK_BYTES : 3 * CHUNK_BYTES + 50])
    assert (check.num_checked, check.num_recorded) == (2, 0), "of the last chunk only a part was there"
    check.check(path, 3 * CHUNK_BYTES, memoryview(DATA + b"beyond the end")[3 * CHUNK_BYTES :])
    assert check.num_checked == 3


def test_what_was_not_known_is_remembered(path: Path):
    check = DigestCheck({path: len(DATA)})
    check.check(path, CHUNK_BYTES, memoryview(DATA)[CHUNK_BYTES : 2 * CHUNK_BYTES])
    assert [digest is None for digest in check.digests().files[path.name].xxh3_64] == [True, False, True, True]
    again = DigestCheck({path: len(DATA)}, check.digests())
    with pytest.raises(DigestMismatch, match=rf"{path}: chunk 1 \(bytes 4096 to 8192\) has the digest [0-9a-f]{{16}}"):
        again.check(path, CHUNK_BYTES, memoryview(bytes(CHUNK_BYTES)))


def test_digests_of_a_file_of_another_size_are_not_held_against_it(path: Path):
    known = hash_files([path])
    path.write_bytes(DATA + b"more")
    check = DigestCheck({path: len(DATA) + 4}, known)
    check.check(path, 0, memoryview(bytes(CHUNK_BYTES)))
    assert (check.num_checked, check.num_recorded) == (0, 1)


def test_digests_survive_the_disk(path: Path, tmp_path: Path):
    kept = digests_path(tmp_path / "model.json")
    assert read_digests(kept) is None
    digests = hash_files([path], identity="of the pull")
    write_digests(kept, digests)
    assert read_digests(kept, "of the pull") == digests
    assert read_digests(kept, "of a newer pull") is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.digests", "model.safetensors"]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"files": {}, "format_version": 99}', b"\xff"])
def test_a_file_that_says_nothing_is_as_good_as_none(tmp_path: Path, text: bytes):
    (tmp_path / "x.digests").write_bytes(text)
    assert read_digests(tmp_path / "x.digests") is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "x.digests").mkdir()
    with pytest.raises(StoreError, match=r"x.digests: cannot be read"):
        read_digests(tmp_path / "x.digests")
    with pytest.raises(StoreError, match="nothing"):
        hash_files([tmp_path / "nothing"])
