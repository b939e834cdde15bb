"""Digests of chunks against the xxhash library, and the file that keeps them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import xxhash

from flashtensors.checkpoint import chunk_digests
from flashtensors.checkpoint.chunk_digests import (
    ChunkHasher,
    DigestCheck,
    ModelDigests,
    digests_path,
    find_identity,
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


def hash_whole(path: Path, identity: str = "") -> ModelDigests:
    hasher = ChunkHasher()
    hasher.update(memoryview(path.read_bytes()))
    return ModelDigests(identity=identity, chunk_bytes=CHUNK_BYTES, files={path.name: hasher.digests()})


@pytest.mark.parametrize("piece_bytes", [1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7, len(DATA)])
@pytest.mark.parametrize("num_bytes", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES, len(DATA)])
def test_digests_are_xxh3_of_the_chunks(piece_bytes: int, num_bytes: int):
    hasher, data = ChunkHasher(), memoryview(DATA)[:num_bytes]
    for start in range(0, num_bytes, piece_bytes):
        hasher.update(data[start : start + piece_bytes])
    of_file = hasher.digests()
    assert of_file.num_bytes == num_bytes
    starts = range(0, num_bytes, CHUNK_BYTES)
    assert of_file.xxh3_64 == tuple(xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES]) for at in starts)


def test_files_have_one_identity_in_any_order_until_one_changes():
    files = [("b", 5, 100), ("a", 7, 200)]
    identity = find_identity(files)
    assert find_identity(reversed(files)) == identity
    assert find_identity([("b", 5, 101), ("a", 7, 200)]) != identity


def test_several_chunks_at_once_and_their_remainder(path: Path):
    known = hash_whole(path)
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
    known = hash_whole(path)
    path.write_bytes(DATA + b"more")
    check = DigestCheck({path: len(DATA) + 4}, known)
    check.check(path, 0, memoryview(bytes(CHUNK_BYTES)))
    assert (check.num_checked, check.num_recorded) == (0, 1)


def test_digests_survive_the_disk(path: Path, tmp_path: Path):
    kept = digests_path(tmp_path / "model.json")
    assert read_digests(kept) is None
    digests = hash_whole(path, identity="of the pull")
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
