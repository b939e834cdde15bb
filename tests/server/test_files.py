"""Files on disk: whole or not there, whatever a crash left, and gone when their time is over."""

import json
from pathlib import Path

import pytest

from flashtensors.errors import ObjectNotFound
from flashtensors.server.files import FileStore, derived_file_id


def write(store: FileStore, data: bytes) -> Path:
    path = store.new_partial()
    path.write_bytes(data)
    return path


def test_files_are_there_after_a_restart(tmp_path: Path) -> None:
    store = FileStore(tmp_path, clock=lambda: 5.0)
    store.open()
    first = store.publish(write(store, b"one"), filename="a.jsonl", purpose="batch")
    store = FileStore(tmp_path, clock=lambda: 9.0)
    store.open()
    second = store.publish(write(store, b"three"), filename="b.jsonl", purpose="batch_output", expires_after_s=60)
    assert store.list() == [second, first]
    assert (first.num_bytes, first.created_at, second.expires_at) == (3, 5, 69)
    assert store.path(second.id).read_bytes() == b"three"
    store.remove(first.id)
    with pytest.raises(ObjectNotFound):
        store.get(first.id)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".data", ".json"]


def test_files_of_one_second_are_listed_newest_first(tmp_path: Path) -> None:
    times_s = iter(1_800_000_000.0 + number / 1000 for number in range(1000))
    store = FileStore(tmp_path, clock=lambda: next(times_s))
    records = [store.publish(write(store, b"x"), filename=f"{n}", purpose="batch") for n in range(12)]
    assert {record.created_at for record in records} == {1_800_000_000}
    assert store.list() == records[::-1]
    record = json.loads((tmp_path / f"{records[3].id}.json").read_text())
    del record["created_ns"]  # as earlier versions wrote it
    (tmp_path / f"{records[3].id}.json").write_text(json.dumps(record))
    store = FileStore(tmp_path, clock=lambda: next(times_s))
    store.open()
    assert [each.id for each in store.list()] == [each.id for each in [*records[:3:-1], *records[2::-1], records[3]]]


@pytest.mark.parametrize(
    "file_id", ["", "file-", "../secret", "file-" + "0" * 32, "file-" + "0" * 31 + "/", "x" * 10**5]
)
def test_what_is_no_file_is_not_found(tmp_path: Path, file_id: str) -> None:
    store = FileStore(tmp_path)
    store.open()
    with pytest.raises(ObjectNotFound):
        store.path(file_id)


def test_what_a_crash_left_half_made_goes(tmp_path: Path) -> None:
    kept, lost = derived_file_id("kept"), derived_file_id("lost")
    for name in (f"{kept}.data", f"{lost}.data", "x.partial", "y.scratch"):
        (tmp_path / name).write_bytes(b"x")
    store = FileStore(tmp_path)
    store.open(keep={kept})
    assert {path.name for path in tmp_path.iterdir()} == {f"{kept}.data"}
    assert store.list() == []
    record = store.publish(tmp_path / "moved already", filename="x", purpose="batch_output", file_id=kept)
    assert store.publish(tmp_path / "again", filename="x", purpose="batch_output", file_id=kept) == record
    assert store.path(kept).read_bytes() == b"x"


def test_an_expired_file_is_hidden_and_then_removed(tmp_path: Path) -> None:
    now_s = 0.0
    store = FileStore(tmp_path, clock=lambda: now_s)
    store.open()
    record = store.publish(write(store, b"x"), filename="x", purpose="batch", expires_after_s=10)
    now_s = 10.0
    assert store.list() == []
    with pytest.raises(ObjectNotFound):
        store.get(record.id)
    store.remove_expired()
    assert list(tmp_path.iterdir()) == []
