"""Models on a CPU: weights that stay in their files, checked all the same."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from flashtensors.checkpoint import chunk_digests
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.record import ModelRecord
from flashtensors.config import Settings
from flashtensors.errors import DigestMismatch, TransferError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.transfer import chunk_reads, crew
from flashtensors.worker.checkpoint_loader import CheckpointLoader
from flashtensors.worker.device import Device
from flashtensors.worker.loading import Grant, LoadedModel
from flashtensors.worker.mapped_load import MappedPlan
from flashtensors.worker.messages import LoadModel

from .harbours import generate, make_harbour, make_loader, plan_model

CPU = Device(name="cpu", description="a CPU", budget_bytes=2**34)


@pytest.fixture
def record(tmp_path: Path) -> ModelRecord:
    """A model of the store in `tmp_path / "store"`."""
    source = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("gemma3_text", vocab_size=4000))
    write_tiny_tokenizer(source)
    return pull(Catalog(tmp_path / "store"), str(source))


def plan(tmp_path: Path, record: ModelRecord, **settings: object) -> MappedPlan:
    loader = CheckpointLoader(
        Settings(device="cpu", storage_path=str(tmp_path / "store"), max_num_seqs=4, **settings),  # pyright: ignore
        CPU,
        max_queue=None,
    )
    planned = loader.plan(LoadModel(model=record.name, folder=record.folder))
    assert isinstance(planned, MappedPlan)
    assert loader.host_tier.capacity_bytes == 0
    loader.close()
    return planned


def load(planned: MappedPlan, cancel: threading.Event | None = None) -> tuple[LoadedModel, int, str]:
    ready: list[LoadedModel] = []
    grant = Grant(kv_bytes=planned.demand.min_flexible_bytes)
    stats = planned.load(grant, lambda *progress: None, cancel or threading.Event(), ready.append)
    assert stats.num_bytes == planned.plan.file_bytes
    return ready[0], stats.num_checked, stats.reader


def flip_a_bit(path: Path, offset: int) -> None:
    """As a disk decays: nobody wrote, so the time of change stays."""
    state = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_progress_counts_bytes_of_the_files_to_the_end(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    loader = CheckpointLoader(Settings(device="cpu", storage_path=str(tmp_path), max_num_seqs=4), CPU, max_queue=None)
    planned = loader.plan(LoadModel(model="m", folder=str(folder), dtype="bfloat16"))
    assert isinstance(planned, MappedPlan)
    assert planned.plan.num_bytes < planned.plan.file_bytes, "it is rounded on its way"
    reports: list[tuple[str, int, int]] = []
    ready: list[LoadedModel] = []
    grant = Grant(kv_bytes=planned.demand.min_flexible_bytes)
    planned.load(grant, lambda *report: reports.append(report), threading.Event(), ready.append)
    assert reports[-1] == ("prepare", planned.plan.file_bytes, planned.plan.file_bytes)
    assert {total_bytes for _, _, total_bytes in reports} == {planned.plan.file_bytes}
    ready[0].close()


def test_answers_are_those_of_weights_in_an_arena(tmp_path: Path, record: ModelRecord) -> None:
    harbour = make_harbour()
    docked = plan_model(make_loader(harbour, tmp_path), "m", record.path)
    ready: list[LoadedModel] = []
    docked.load(Grant(kv_bytes=docked.demand.min_flexible_bytes), lambda *_: None, threading.Event(), ready.append)
    expected = generate(ready[0])
    ready[0].close()
    harbour.close()
    loaded, _, _ = load(plan(tmp_path, record))
    assert generate(loaded) == expected
    assert loaded.close(keeps_kv=True) is None


def test_what_lies_well_in_its_file_is_used_there(tmp_path: Path, record: ModelRecord) -> None:
    planned = plan(tmp_path, record)
    is_aligned = any(extent.file_offset % 64 == 0 for extent in planned.plan.extents if "embed" in extent.name)
    loaded, _, reader = load(planned)
    assert ("mmap" in reader) == is_aligned
    loaded.close()


def test_a_plan_is_loaded_again_and_again(tmp_path: Path, record: ModelRecord) -> None:
    planned = plan(tmp_path, record)
    answers = []
    for _ in range(3):
        loaded, _, _ = load(planned)
        answers.append(generate(loaded))
        loaded.close()
    assert answers[0] == answers[1] == answers[2]
    assert planned.fill(10**9, lambda *_: None, threading.Event()).num_bytes == 0


@pytest.mark.parametrize("offset", [-5, 20_000])
def test_a_flipped_bit_is_found_in_mapped_and_in_read_weights(tmp_path: Path, record: ModelRecord, offset: int) -> None:
    path = next(record.path.glob("*.safetensors"))
    loaded, num_checked, _ = load(plan(tmp_path, record))
    loaded.close()
    assert num_checked >= 1
    flip_a_bit(path, offset % path.stat().st_size)
    with pytest.raises(DigestMismatch, match=path.name):
        load(plan(tmp_path, record))
    loaded, num_checked, _ = load(plan(tmp_path, record, verify_digests=False))
    assert num_checked == 0
    loaded.close()


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_model_that_was_damaged_is_planned_again_once_its_bytes_are_right(
    tmp_path: Path, record: ModelRecord, is_listed: bool
) -> None:
    settings = Settings(device="cpu", storage_path=str(tmp_path / "store"), max_num_seqs=4)
    loader = CheckpointLoader(settings, CPU, max_queue=None)
    command = LoadModel(model=record.name if is_listed else "a folder", folder=record.folder)
    path = next(record.path.glob("*.safetensors"))

    def load_again() -> None:
        planned = loader.plan(command)
        assert isinstance(planned, MappedPlan)
        load(planned)[0].close()

    load_again()
    planned = loader.plan(command)
    assert isinstance(planned, MappedPlan)
    flip_a_bit(path, path.stat().st_size - 5)
    with pytest.raises(DigestMismatch):
        load(planned)
    for _ in range(2):
        with pytest.raises(DigestMismatch, match=path.name):
            loader.plan(command)  # so that nothing has to leave for it
    flip_a_bit(path, path.stat().st_size - 5)
    load_again()
    loader.close()


def test_progress_of_a_load_that_checks_counts_from_its_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four chunks, of which all but the first have only weights that are used in place."""
    monkeypatch.setattr(chunk_reads, "DIGEST_CHUNK_BYTES", 2**18)
    monkeypatch.setattr(chunk_digests, "DIGEST_CHUNK_BYTES", 2**18)
    monkeypatch.setattr(crew, "PROGRESS_INTERVAL_S", 0.0)
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama", vocab_size=8000), dtype="float32")
    loader = CheckpointLoader(Settings(device="cpu", storage_path=str(tmp_path), max_num_seqs=4), CPU, max_queue=None)
    planned = loader.plan(LoadModel(model="m", folder=str(folder)))
    assert isinstance(planned, MappedPlan)
    reports: list[tuple[str, int, int]] = []
    ready: list[LoadedModel] = []
    grant = Grant(kv_bytes=planned.demand.min_flexible_bytes)
    planned.load(grant, lambda *report: reports.append(report), threading.Event(), ready.append)
    ready[0].close()
    done = [done_bytes for _, done_bytes, _ in reports]
    assert done == sorted(done)
    assert done[0] < 0.5 * planned.plan.file_bytes
    assert len({num for num in done if num < done[-1]}) >= 2


def test_a_cancelled_load_ends_with_a_typed_error(tmp_path: Path, record: ModelRecord) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(TransferError, match="cancelled"):
        load(plan(tmp_path, record), cancel)
