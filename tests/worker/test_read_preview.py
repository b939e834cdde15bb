"""How a model would be read, against how it then is."""

import threading
from pathlib import Path

import pytest

from flashtensors.config import Settings
from flashtensors.errors import CheckpointError, WorkerError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer.probe import FileSystem, FileSystemProbe
from flashtensors.transfer.readers.page_cache import PageCache
from flashtensors.worker import device
from flashtensors.worker.checkpoint_loader import CheckpointLoader
from flashtensors.worker.loading import Grant, LoadedModel
from flashtensors.worker.messages import LoadModel
from flashtensors.worker.read_preview import ask_preview, preview_load

CPU = Settings(device="cpu")


@pytest.mark.parametrize(("dtype", "readers"), [("bfloat16", ["mmap", "buffered"]), ("float16", ["buffered"])])
def test_a_load_on_a_cpu_maps_what_need_not_change(tmp_path: Path, dtype: str, readers: list[str]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"), dtype=dtype)
    preview = preview_load(CPU, folder)
    assert list(preview.num_bytes) == readers
    loaded: list[LoadedModel] = []
    planned = CheckpointLoader(CPU, device.open_device(CPU), max_queue=1).plan(LoadModel(model="m", folder=str(folder)))
    grant = Grant(kv_bytes=planned.demand.min_flexible_bytes)
    stats = planned.load(grant, lambda *_: None, threading.Event(), loaded.append)
    loaded[0].close()
    assert set(stats.reader.split(" and ")) == set(readers)
    assert sum(preview.num_bytes.values()) == stats.num_bytes


def test_a_gpu_maps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    next(folder.glob("*.safetensors")).read_bytes()
    monkeypatch.setattr(device, "find_cuda_index", lambda settings: 0)
    preview = preview_load(Settings(), folder)
    assert list(preview.num_bytes) == ["buffered"], "it is in the page cache"
    assert "O_DIRECT" in preview.reason


def test_files_of_others_are_read_from_the_disk_and_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    monkeypatch.setattr(device, "find_cuda_index", lambda settings: 0)
    monkeypatch.setattr(PageCache, "find_share", lambda self, fd, offset, num_bytes: None)
    accepting = FileSystem(kind="fake", accepts_direct=True, reason="so it is")
    monkeypatch.setattr(FileSystemProbe, "file_system", lambda self, path: accepting)
    preview = preview_load(Settings(), folder)
    assert list(preview.num_bytes) == ["direct"]
    assert "the kernel does not say what the page cache holds" in preview.reason


def test_another_process_finds_the_same(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    assert ask_preview(CPU, folder) == preview_load(CPU, folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as expected:
        preview_load(CPU, folder)
    with pytest.raises(WorkerError) as error:
        ask_preview(CPU, folder)
    assert error.value.message == expected.value.message
