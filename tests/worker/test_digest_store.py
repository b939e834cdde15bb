"""Digests of models in a store: a pull's hold for good, those of a user's folder as long as its files do."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.chunk_digests import ModelDigests
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.record import ModelRecord
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.worker.messages import (
    Deltas,
    Generate,
    LoadFailed,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    RequestFailed,
    UnloadModel,
    WireError,
)

from .fake_models import request
from .home import Home


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder."""
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def copy(catalog: Catalog, folder: Path) -> ModelRecord:
    """A model whose files a pull has made."""
    return pull(catalog, str(folder), quantization="fp8")


@pytest.fixture
def home(catalog: Catalog) -> Iterator[Home]:
    home = Home("cpu", storage_path=str(catalog.store))
    yield home
    home.worker.close()


def weights_of(record: ModelRecord) -> Path:
    return next(record.path.glob("*.safetensors"))


def damage(path: Path) -> None:
    """A write that went astray; the time of change moves."""
    with open(path, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 16]))
    os.utime(path)


def lose_digests(catalog: Catalog, record: ModelRecord, rest: bytes | None) -> None:
    path = catalog.digests_path(record)
    path.unlink()
    if rest is not None:
        path.write_bytes(rest)


def load(home: Home, record: ModelRecord) -> ModelLoaded | WireError:
    home.worker.handle(LoadModel(model=record.name, folder=record.folder))
    event = home.wait_for((ModelLoaded, LoadFailed))
    if isinstance(event, LoadFailed):
        return event.error
    assert isinstance(event, ModelLoaded)
    home.worker.handle(UnloadModel(model=record.name))
    home.wait_for(ModelUnloaded)
    return event


def check_refused(error: ModelLoaded | WireError, path: Path) -> None:
    assert isinstance(error, WireError), "damaged weights are served"
    assert error.code == "digest_mismatch"
    assert f"{path}: chunk 0 (bytes 0 to {path.stat().st_size})" in error.message
    assert "flash pull --force" in error.message


def test_a_file_of_a_pull_that_was_written_over_is_not_served_until_it_is_pulled_again(
    catalog: Catalog, copy: ModelRecord, folder: Path, home: Home
) -> None:
    assert isinstance(load(home, copy), ModelLoaded)
    path = weights_of(copy)
    damage(path)
    check_refused(load(home, copy), path)
    home.worker.handle(Generate(request=request("r", copy.name)))
    failed = home.wait_for((RequestFailed, Deltas))
    assert isinstance(failed, RequestFailed)
    check_refused(failed.error, path)
    again = pull(catalog, str(folder), quantization="fp8", force=True)
    assert isinstance(load(home, again), ModelLoaded)


def test_a_new_worker_finds_the_damage_too(catalog: Catalog, copy: ModelRecord, home: Home) -> None:
    damage(weights_of(copy))
    check_refused(load(home, copy), weights_of(copy))


def test_a_file_of_a_pull_that_was_only_touched_is_served(copy: ModelRecord, home: Home) -> None:
    os.utime(weights_of(copy))
    assert isinstance(load(home, copy), ModelLoaded)


def test_a_file_of_a_pull_that_another_took_the_place_of_is_not_served(
    catalog: Catalog, copy: ModelRecord, home: Home
) -> None:
    path = weights_of(copy)
    write_tiny_checkpoint(copy.path, tiny_config("llama"), dtype="float32")
    error = load(home, copy)
    assert isinstance(error, WireError)
    assert error.code == "digest_mismatch"
    assert f"{path}: {path.stat().st_size} bytes, but it had " in error.message


@pytest.mark.parametrize("are_lost", [False, True])
def test_a_file_that_came_after_the_pull_is_not_served(
    catalog: Catalog, copy: ModelRecord, home: Home, are_lost: bool
) -> None:
    if are_lost:
        lose_digests(catalog, copy, None)
    weights_of(copy).unlink()
    write_tiny_checkpoint(copy.path, tiny_config("llama"), num_shards=2)
    error = load(home, copy)
    assert isinstance(error, WireError)
    assert error.code == "digest_mismatch"
    assert "but it was not there when the model was pulled" in error.message


def test_a_file_of_a_user_that_changed_is_another_file(catalog: Catalog, folder: Path, home: Home) -> None:
    record = pull(catalog, str(folder))
    path = weights_of(record)
    write_tiny_checkpoint(folder, tiny_config("llama"), seed=1)
    assert isinstance(load(home, record), ModelLoaded)
    state = path.stat()
    damage(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # now the disk has decayed
    check_refused(load(home, record), path)
    damage(path)  # it is what it was, written anew
    assert isinstance(load(home, record), ModelLoaded)


@pytest.mark.parametrize("rest", [None, b"{torn"])
def test_a_pull_whose_digests_are_lost_is_held_to_its_sha256(
    catalog: Catalog, copy: ModelRecord, home: Home, rest: bytes | None
) -> None:
    lose_digests(catalog, copy, rest)
    damage(weights_of(copy))
    for _ in range(2):
        error = load(home, copy)
        assert isinstance(error, WireError), "what is there now was taken for what was pulled"
        assert error.code == "digest_mismatch"
        assert f"{weights_of(copy)}: its sha256 is " in error.message
        assert "flash pull --force" in error.message
    damage(weights_of(copy))  # it is what it was
    assert isinstance(load(home, copy), ModelLoaded)


def test_digests_that_were_lost_are_made_anew_once(
    catalog: Catalog, copy: ModelRecord, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    path = catalog.digests_path(copy)
    pulled = path.read_bytes()
    lose_digests(catalog, copy, None)
    assert isinstance(load(home, copy), ModelLoaded)
    assert path.read_bytes() == pulled
    assert caplog.text.count(f"{copy.name}: digests of its chunks are lost") == 1
    damage(weights_of(copy))
    check_refused(load(home, copy), weights_of(copy))


def test_digests_of_a_part_of_a_pull_are_made_whole(catalog: Catalog, copy: ModelRecord, home: Home) -> None:
    path = catalog.digests_path(copy)
    pulled = msgspec.json.decode(path.read_bytes(), type=ModelDigests)
    files = {name: msgspec.structs.replace(file, xxh3_64=(None,)) for name, file in pulled.files.items()}
    lose_digests(catalog, copy, msgspec.json.encode(msgspec.structs.replace(pulled, files=files)))
    damage(weights_of(copy))
    error = load(home, copy)
    assert isinstance(error, WireError)
    assert "its sha256 is " in error.message


def test_a_record_without_sha256_says_nothing_of_what_is_there(catalog: Catalog, copy: ModelRecord, home: Home) -> None:
    nameless = [msgspec.structs.replace(file, sha256="") for file in copy.files]
    with catalog.lock(copy.name):
        catalog.publish(msgspec.structs.replace(copy, files=nameless))
    lose_digests(catalog, copy, None)
    assert isinstance(load(home, copy), ModelLoaded)
    damage(weights_of(copy))
    check_refused(load(home, copy), weights_of(copy))


def test_a_folder_of_a_user_has_no_sha256_to_hold(catalog: Catalog, folder: Path, home: Home) -> None:
    record = pull(catalog, str(folder))
    lose_digests(catalog, record, None)
    damage(weights_of(record))
    assert isinstance(load(home, record), ModelLoaded)
