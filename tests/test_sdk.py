"""The SDK as its users write it, on a checkpoint made here."""

import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashtensors as ft
from flashtensors import LLM, SamplingParams, flash, sdk
from flashtensors.errors import BackendUnavailable, ConfigError, InvalidName, ModelNotFound, WorkerError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", tiny_config("llama"), dtype="bfloat16")
    return write_tiny_tokenizer(folder)


@pytest.fixture(autouse=True)
def fresh_session(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has configured nothing, with its default store in a temporary folder."""
    monkeypatch.setattr(sdk, "_session", sdk._Session())
    monkeypatch.setenv("FLASH_STORAGE_PATH", str(store))
    monkeypatch.setenv("FLASH_DEVICE", "cpu")
    yield
    ft.cleanup_gpu()


def test_the_sdk_runs_as_users_write_it(folder: Path, store: Path, tmp_path: Path) -> None:
    ft.configure(
        storage_path=str(store),
        mem_pool_size=30 * 1024**3,
        chunk_size=32 * 1024**2,
        num_threads=4,
        gpu_memory_utilization=0.8,
        server_host="127.0.0.1",
        server_port=8073,
    )
    registered = ft.register_model(
        model_id=str(folder), backend="auto", torch_dtype="bfloat16", force=False, hf_token=None
    )
    assert (registered["status"], registered["backend"]) == ("success", "flashtensors")
    assert Path(registered["path"]).is_dir()
    metrics = registered["metrics"]
    assert set(metrics) == {"total_time", "download_time", "transform_time", "register_time", "model_size"}
    assert 0 < metrics["register_time"] <= metrics["total_time"]

    llm = ft.load_model(model_id="tiny", backend="auto", dtype="bfloat16", gpu_memory_utilization=0.8)
    outputs = llm.generate(["Hello, my name is"], SamplingParams(temperature=0.1, top_p=0.95, max_tokens=50))
    assert [output.prompt for output in outputs] == ["Hello, my name is"]
    assert outputs[0].outputs[0].text

    info = ft.get_model_info("tiny")
    assert info is not None
    assert set(info) == {"model_id", "path", "full_path", "backend", "size", "ranks"}
    assert (info["model_id"], info["size"], info["ranks"]) == ("tiny", metrics["model_size"], 1)
    assert ft.list_models() == {"tiny": info}
    ft.cleanup_gpu()
    with pytest.raises(WorkerError):
        llm.generate("Hello")
    assert ft.shutdown_server() is False

    state = torch.nn.Linear(3, 3).state_dict()
    flash.save_dict(state, tmp_path / "saved")
    loaded = flash.load_dict(tmp_path / "saved", {"": "cpu"})
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_dtype_of_the_registration_is_used(folder: Path) -> None:
    ft.register_model(str(folder), torch_dtype=torch.float32)
    with ft.load_model("tiny") as llm:
        assert llm.loaded.dtype == "float32"
    with ft.load_model("tiny", dtype=torch.bfloat16) as llm:
        assert llm.loaded.dtype == "bfloat16"
    ft.register_model(str(folder))
    with ft.load_model("tiny") as llm:
        assert llm.loaded.dtype == "bfloat16", "the checkpoint's"


def test_unload_closes_one_model(folder: Path) -> None:
    ft.register_model(str(folder))
    llm = ft.load_model("tiny", max_num_seqs=2)
    assert isinstance(llm, LLM)
    assert llm.settings.max_num_seqs == 2
    assert ft.unload_model("other") == 0
    assert llm.generate("hello")
    assert ft.unload_model("tiny") == 1
    assert ft.unload_model("tiny") == 0
    with pytest.raises(WorkerError):
        llm.generate("hello")


def test_models_can_be_removed(folder: Path) -> None:
    ft.register_model(str(folder))
    ft.remove_model("tiny")
    assert (ft.get_model_info("tiny"), ft.list_models()) == (None, {})
    with pytest.raises(ModelNotFound):
        ft.remove_model("tiny")
    assert (folder / "config.json").exists(), "the user's own files stay"


def test_settings_are_kept_in_the_store(store: Path) -> None:
    ft.configure(storage_path=str(store), num_threads=3, chunk_size="1MiB", api_key='qu"ote ü')
    ft.configure(num_threads=5)
    path = store / "config.toml"
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {
        "api_key": 'qu"ote ü',
        "chunk_size": 1024**2,
        "num_threads": 5,
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    settings = ft.get_config()
    assert (settings.num_threads, settings.chunk_size, settings.storage_path) == (5, 1024**2, str(store))


def test_a_refused_configuration_changes_nothing(store: Path) -> None:
    before = ft.get_config()
    with pytest.raises(ConfigError, match="registration_required"):
        ft.configure(registration_required=True)
    with pytest.raises(ConfigError, match="did you mean 'num_threads'"):
        ft.configure(num_thread=3)
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        ft.configure(gpu_memory_utilization=2.0)
    assert not (store / "config.toml").exists()
    assert ft.get_config() == before


@pytest.mark.parametrize("call", [ft.register_model, ft.load_model])
def test_other_backends_are_named(call: object) -> None:
    with pytest.raises(BackendUnavailable, match="backend 'vllm' is not part of this version"):
        call("tiny", backend="vllm")  # pyright: ignore
    with pytest.raises(ConfigError, match="backend is 'turbo'"):
        call("tiny", backend="turbo")  # pyright: ignore


def test_errors_are_raised_and_not_returned() -> None:
    with pytest.raises(InvalidName):
        ft.register_model("no such model")
    with pytest.raises(ConfigError, match="dtype is 'int3'"):
        ft.register_model("./tiny", torch_dtype="int3")


def test_importing_the_package_imports_nothing_else() -> None:
    program = (
        "import sys, flashtensors\n"
        "from flashtensors import SamplingParams, configure, list_models, shutdown_server\n"
        "print(*(name for name in ('torch', 'transformers', 'zmq', 'starlette') if name in sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ft.nothing  # pyright: ignore
    assert set(ft.__all__) <= set(dir(ft))
