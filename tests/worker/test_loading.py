"""Real checkpoints through a worker: what a load reports, and that nothing of a model outlives it."""

import gc
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flashtensors.config import Settings
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer.load_plan import LoadPlan
from flashtensors.transfer.mapped import MappedWeights
from flashtensors.worker import mapped_load
from flashtensors.worker.device import open_device
from flashtensors.worker.messages import (
    Deltas,
    Generate,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLoaded,
    ModelUnloaded,
    UnloadModel,
)

from .fake_models import request
from .home import Home

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_config("llama"))


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a shape that a GPU's kernels take."""
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    folder = tmp_path_factory.mktemp("models") / "wide"
    return write_tiny_checkpoint(folder, tiny_config("llama", **shape), dtype="bfloat16")


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_of_a_model_outlives_its_unload(wide_folder: Path, device: str) -> None:
    home = Home(device)
    command = LoadModel(model="m", folder=str(wide_folder))
    home.worker.handle(command)
    loaded = home.wait_for(ModelLoaded)
    assert isinstance(loaded, ModelLoaded)
    assert set(loaded.phase_seconds) >= {"queue", "plan", "read", "prepare"}
    num_tokens = loaded.num_kv_blocks * loaded.block_size
    assert loaded.max_model_len == 512
    assert num_tokens == 4 * 512 if device == "cpu" else num_tokens >= 4 * 512
    home.worker.handle(Generate(request=request("r", "m", max_tokens=8, ignore_eos=True)))
    home.wait_for(Deltas)
    engine = home.worker._models.loaded["m"].engine  # pyright: ignore
    gone = [weakref.ref(engine), weakref.ref(engine._runner)]  # pyright: ignore
    del engine
    gc.disable()
    try:
        home.worker.handle(UnloadModel(model="m"))
        home.wait_for(ModelUnloaded)
        assert [reference() for reference in gone] == [None, None], "a reference cycle keeps the model's memory"
    finally:
        gc.enable()
    home.worker.close()


@pytest.mark.gpu
def test_memory_of_a_device_is_used_again(wide_folder: Path) -> None:
    home = Home("cuda:0")
    free_bytes = []
    for _ in range(4):
        home.worker.handle(LoadModel(model="m", folder=str(wide_folder)))
        home.wait_for(ModelLoaded)
        home.worker.handle(Generate(request=request("r", "m", max_tokens=2, ignore_eos=True)))
        home.wait_for(Deltas)
        home.worker.handle(UnloadModel(model="m"))
        home.wait_for(ModelUnloaded)
        torch.cuda.synchronize()
        free_bytes.append(torch.cuda.mem_get_info()[0])
    assert free_bytes[1] - free_bytes[-1] <= free_bytes[1] // 100  # graphs are captured when a shape comes again
    assert open_device(Settings(device="cuda:0")).budget_bytes > 0
    home.worker.close()


def test_progress_says_bytes_of_the_files(folder: Path) -> None:
    home = Home("cpu")
    home.worker.handle(LoadModel(model="m", folder=str(folder)))
    home.wait_for(ModelLoaded)
    progress = [event for event in home.events if isinstance(event, LoadProgress)]
    assert [event.phase for event in progress] == ["read", "prepare"]
    assert all(event.done_bytes == event.total_bytes > 300_000 for event in progress)
    home.worker.close()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    home = Home("cpu")
    home.worker.handle(LoadModel(model="m", folder=str(tmp_path)))
    failed = home.wait_for(LoadFailed)
    assert isinstance(failed, LoadFailed)
    assert failed.error.code == "invalid_checkpoint"
    assert "config.json" in failed.error.message
    home.worker.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Home, Path]]:
    """A worker that has loaded and unloaded a model, and the model's weights."""
    home = Home("cpu")
    folder = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    home.worker.handle(LoadModel(model="m", folder=str(folder)))
    home.wait_for(ModelLoaded)
    home.worker.handle(UnloadModel(model="m"))
    home.wait_for(ModelUnloaded)
    yield home, next(folder.glob("*.safetensors"))
    home.worker.close()


def replace_with_a_copy(weights: Path) -> None:
    """The same size and time of change, and another file."""
    copy = weights.with_suffix(".copy")
    shutil.copy2(weights, copy)
    copy.replace(weights)


def replace_with_a_fine_tune(weights: Path) -> None:
    write_tiny_checkpoint(weights.parent, tiny_config("llama"), seed=1)


def replace_with_shards(weights: Path) -> None:
    weights.unlink()
    write_tiny_checkpoint(weights.parent, tiny_config("llama", num_hidden_layers=3), num_shards=2)


@pytest.mark.parametrize("change", [os.utime, replace_with_a_copy, replace_with_a_fine_tune, replace_with_shards])
def test_a_load_plans_files_again_that_have_changed_since(
    served: tuple[Home, Path], change: Callable[[Path], None]
) -> None:
    home, weights = served
    change(weights)
    home.worker.handle(LoadModel(model="m", folder=str(weights.parent)))
    home.wait_for(ModelLoaded)
    assert not [event for event in home.events if isinstance(event, LoadFailed)]


def test_a_request_that_brings_changed_files_is_answered(served: tuple[Home, Path]) -> None:
    home, weights = served
    replace_with_a_fine_tune(weights)
    home.worker.handle(Generate(request=request("r", "m", max_tokens=2, ignore_eos=True)))
    home.wait_for(Deltas)


def test_files_that_change_during_the_load_are_an_error_and_the_next_load_reads_them(
    served: tuple[Home, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, weights = served
    map_weights = mapped_load.map_weights

    def touch_first(plan: LoadPlan) -> MappedWeights:
        os.utime(weights)
        return map_weights(plan)

    command = LoadModel(model="m", folder=str(weights.parent))
    with monkeypatch.context() as patch:
        patch.setattr(mapped_load, "map_weights", touch_first)
        home.worker.handle(command)
        failed = home.wait_for(LoadFailed)
    assert isinstance(failed, LoadFailed)
    assert failed.error.code == "file_changed"
    home.worker.handle(command)
    home.wait_for(ModelLoaded)
