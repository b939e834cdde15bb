import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.chunk_digests import read_digests
from flashtensors.checkpoint.progress import PullProgress
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.record import ModelRecord
from flashtensors.errors import CheckpointError, DiskFull, PullError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

from .fake_hub import COMMIT, FakeHub

UNWANTED = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "consolidated.safetensors": b"a second copy",
    "original/params.json": b"{}",
    "original/model.safetensors": b"a third copy",
    "README.md": b"# Tiny",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one model in two shards, and an empty Hugging Face cache."""
    from huggingface_hub import constants

    folder = write_tiny_checkpoint(tmp_path / "source", tiny_config("llama"), num_shards=2)
    write_tiny_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with FakeHub(files | UNWANTED).serve() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets, had it been there at import
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def catalog(store: Path) -> Catalog:
    return Catalog(store)


def wanted(hub: FakeHub) -> dict[str, bytes]:
    return {name: data for name, data in hub.files.items() if name not in UNWANTED}


def test_a_repository_stays_in_the_cache_and_is_read_there(hub: FakeHub, catalog: Catalog, tmp_path: Path) -> None:
    reports: list[PullProgress] = []
    record = pull(catalog, "org/tiny", progress=reports.append)
    assert (record.name, record.source, record.revision) == ("org/tiny", "org/tiny", COMMIT)
    assert record.path == tmp_path / "cache" / "models--org--tiny" / "snapshots" / COMMIT
    assert {path.name: path.read_bytes() for path in record.path.iterdir()} == wanted(hub)
    assert {file.path for file in record.files} == set(wanted(hub))
    assert sorted(hub.downloads()) == sorted(wanted(hub)), "each wanted file once, and nothing else"
    assert list((catalog.store / "models").iterdir()) == []
    assert catalog.verify("org/tiny").is_ok
    assert catalog.find(f"org/tiny@{COMMIT}") == record

    downloading = [report for report in reports if report.status == "downloading"]
    num_bytes = sum(map(len, wanted(hub).values()))
    assert (downloading[-1].done_bytes, downloading[-1].total_bytes) == (num_bytes, num_bytes)
    assert [report.done_bytes for report in downloading] == sorted(report.done_bytes for report in downloading)


def test_a_model_that_is_there_needs_no_hub(hub: FakeHub, catalog: Catalog) -> None:
    record = pull(catalog, "org/tiny")
    num_requests = len(hub.requests)
    assert pull(catalog, "org/tiny") == record
    assert pull(catalog, f"org/tiny@{COMMIT}") == record
    assert len(hub.requests) == num_requests
    assert pull(catalog, "org/tiny", force=True).files == record.files
    assert len(hub.requests) > num_requests


def test_damage_in_the_cache_is_found_and_mended_by_force(hub: FakeHub, catalog: Catalog) -> None:
    record = pull(catalog, "org/tiny")
    path = record.path / "model-00001-of-00002.safetensors"
    digests = read_digests(catalog.digests_path(record), COMMIT)
    assert digests is not None, "they belong to the commit, not to times of change"
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xa5")
    assert catalog.verify("org/tiny").changed == [path.name]
    pull(catalog, "org/tiny", force=True)
    assert catalog.verify("org/tiny").is_ok
    assert path.read_bytes() == hub.files[path.name]
    assert read_digests(catalog.digests_path(record), COMMIT) == digests


def test_a_cache_that_was_cleared_is_filled_again(hub: FakeHub, catalog: Catalog) -> None:
    record = pull(catalog, "org/tiny")
    (record.path / "config.json").unlink()
    assert catalog.verify("org/tiny").missing == ["config.json"]
    assert pull(catalog, "org/tiny").is_complete()
    assert catalog.verify("org/tiny").is_ok


def test_a_pinned_revision_is_a_model_of_its_own(hub: FakeHub, catalog: Catalog) -> None:
    record = pull(catalog, "org/tiny", revision="v1")
    assert record.name == "org/tiny@v1"
    assert "GET /api/models/org/tiny/revision/v1" in hub.requests
    assert catalog.find("org/tiny") is None


def test_a_broken_download_goes_on_where_it_broke(
    hub: FakeHub, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    name = "model-00001-of-00002.safetensors"
    hub.cut_once[name] = 100_000
    record = pull(catalog, "org/tiny")
    assert (record.path / name).read_bytes() == hub.files[name]
    assert any(line.endswith(f"{name} bytes=100000-") for line in hub.requests)


def test_remove_leaves_the_cache(hub: FakeHub, catalog: Catalog) -> None:
    record = pull(catalog, "org/tiny")
    catalog.remove("org/tiny")
    assert catalog.list() == []
    assert record.is_complete()


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("org/absent", "does not exist, or is private: check the spelling"),
        ("org/tiny@v9", "no such revision"),
        ("org/not--allowed", "the download failed: Cannot have -- or"),
        ("org/gated", "is gated: accept its terms"),
    ],
)
def test_a_refusal_says_what_to_do(hub: FakeHub, catalog: Catalog, reference: str, problem: str) -> None:
    with pytest.raises(PullError, match=problem):
        pull(catalog, reference)
    assert catalog.list() == []


def test_a_token_opens_a_gated_repository(hub: FakeHub, catalog: Catalog) -> None:
    assert pull(catalog, "org/gated", token="good").name == "org/gated"


def test_a_hub_that_is_down_is_an_error_unless_the_cache_has_the_model(
    hub: FakeHub, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    record = pull(catalog, "org/tiny")
    catalog.remove("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(catalog, "org/tiny").files == record.files
    with pytest.raises(PullError, match="cannot be reached and is not in the Hugging Face cache"):
        pull(catalog, "org/gated")


def test_a_repository_without_safetensors_is_refused(hub: FakeHub, catalog: Catalog) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.startswith("model")}
    with pytest.raises(PullError, match="no safetensors weights"):
        pull(catalog, "org/tiny")
    assert catalog.list() == []


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model-00002-of-00002.safetensors"])
def test_an_incomplete_repository_is_named_and_not_listed(hub: FakeHub, catalog: Catalog, missing: str) -> None:
    del hub.files[missing]
    with pytest.raises(CheckpointError, match=missing):
        pull(catalog, "org/tiny")
    assert catalog.list() == []


def test_a_full_cache_is_disk_full(hub: FakeHub, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(DiskFull, match="no room left for the Hugging Face cache"):
        pull(catalog, "org/tiny")
    assert catalog.list() == []


def test_two_names_for_one_repository_share_its_files(hub: FakeHub, catalog: Catalog) -> None:
    first: ModelRecord = pull(catalog, "org/tiny")
    second = pull(catalog, "org/tiny", name="mine")
    assert (second.name, second.folder) == ("mine", first.folder)
    assert len(hub.downloads()) == len(wanted(hub))
