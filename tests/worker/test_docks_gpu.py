"""Docks on a GPU: graphs that serve the next model, layers that wait for their weights, a thousand swaps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from flashtensors.config import Settings
from flashtensors.errors import TransferError
from flashtensors.kernels.binaries import list_binaries
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.worker.checkpoint_loader import CheckpointLoader
from flashtensors.worker.device import Device
from flashtensors.worker.docked_load import DockedPlan
from flashtensors.worker.harbour import Harbour
from flashtensors.worker.messages import LoadModel, Register

from .harbours import Loading, generate

pytestmark = pytest.mark.gpu

ALL = 10**12
PROMPT = list(range(3, 203))
SHAPE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048}

Plan = Callable[[str], DockedPlan]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two fine-tunes of one architecture, and a larger model of another."""
    base = tmp_path_factory.mktemp("models")
    shape = {**SHAPE, "intermediate_size": 1024, "max_position_embeddings": 2048}
    configs = {name: tiny_config("qwen3", **shape) for name in "ab"}
    configs["long"] = tiny_config("llama", **{**shape, "num_hidden_layers": 12})
    return {
        name: write_tiny_checkpoint(base / name, config, seed=seed, dtype="bfloat16")
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture
def make_loader(tmp_path: Path) -> Iterator[Callable[[], CheckpointLoader]]:
    """Loaders of 4 GiB of the device."""
    loaders: list[CheckpointLoader] = []

    def make() -> CheckpointLoader:
        settings = Settings(device="cuda:0", mem_pool_size=2 << 30, storage_path=str(tmp_path), max_num_seqs=8)
        device = Device(name="cuda:0", description="a GPU", budget_bytes=4 << 30)
        loaders.append(CheckpointLoader(settings, device, max_queue=None))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def loader(make_loader: Callable[[], CheckpointLoader]) -> CheckpointLoader:
    return make_loader()


def harbour_of(loader: CheckpointLoader) -> Harbour:
    harbour = loader._harbour  # pyright: ignore
    assert harbour is not None
    return harbour


@pytest.fixture
def plan(loader: CheckpointLoader, folders: dict[str, Path]) -> Plan:
    def make(name: str) -> DockedPlan:
        planned = loader.plan(LoadModel(model=name, folder=str(folders[name])))
        assert isinstance(planned, DockedPlan)
        return planned

    return make


def test_graphs_of_one_fine_tune_serve_the_next(
    make_loader: Callable[[], CheckpointLoader], plan: Plan, folders: dict[str, Path]
) -> None:
    expected: dict[str, list[int]] = {}
    for name in "ab":
        fresh = make_loader().plan(LoadModel(model=name, folder=str(folders[name])))
        assert isinstance(fresh, DockedPlan)
        loaded = Loading(fresh).run()
        expected[name] = generate(loaded, prompt=PROMPT, max_tokens=32)
        loaded.close()
    assert expected["a"] != expected["b"]
    planned, runners, captures = {name: plan(name) for name in "ab"}, set(), []
    for name in "abababab":
        loaded = Loading(planned[name], host_bytes=ALL).run()
        for _ in range(3):
            assert generate(loaded, prompt=PROMPT, max_tokens=32) == expected[name]
        runner = loaded.engine._runner._runner  # pyright: ignore
        runners.add(id(runner))
        captures.append(runner.num_captures)
        loaded.close()
    assert len(runners) == 1
    assert captures[2:] == [captures[2]] * 6


def test_a_registered_model_compiles_nothing_for_its_first_answers(
    loader: CheckpointLoader, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tiny_config("qwen3", **{**SHAPE, "head_dim": 128, "max_position_embeddings": 1024})
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("models"), config, dtype="bfloat16")
    loader.expect(Register(model="m", folder=str(folder)))
    warmer = harbour_of(loader).warmer
    assert warmer is not None
    warmer.join()
    (before,) = list_binaries(tmp_path / "kernels")
    assert before.num_kernels > 20
    planned = loader.plan(LoadModel(model="m", folder=str(folder)))
    assert isinstance(planned, DockedPlan)
    loaded = Loading(planned).run()
    for _ in range(3):
        generate(loaded, prompt=PROMPT, max_tokens=32)
    loaded.close()
    assert [found.num_kernels for found in list_binaries(tmp_path / "kernels")] == [before.num_kernels]


def test_steps_may_begin_before_the_last_byte(plan: Plan) -> None:
    """Tokens that are drawn while layers land are those of a model that has landed."""
    planned = plan("long")
    first = Loading(planned, host_bytes=ALL)
    loaded = first.run()
    expected = generate(loaded, prompt=PROMPT, max_tokens=8)
    loaded.close()
    for _ in range(20):
        ready = threading.Event()
        load = Loading(planned, host_bytes=ALL, on_ready=lambda _, ready=ready: ready.set())
        thread = threading.Thread(target=load.run)
        thread.start()
        assert ready.wait(60)
        assert generate(load.ready[0], prompt=PROMPT, max_tokens=8) == expected
        thread.join()
        load.ready[0].close()


def test_a_kept_cache_is_read_at_the_dock_that_it_comes_back_to(plan: Plan) -> None:
    first = Loading(plan("a")).run()
    expected = generate(first, prompt=PROMPT, max_tokens=16)
    kept = first.close(keeps_kv=True)
    sibling = Loading(plan("b")).run()
    generate(sibling, prompt=PROMPT, max_tokens=16)
    second = Loading(plan("a"), kept=kept).run()
    assert generate(second, prompt=PROMPT, max_tokens=16) == expected
    assert second.engine.stats().prefix_hits >= 192
    second.close()
    sibling.close()


def test_a_load_that_is_cancelled_half_way_gives_everything_back(loader: CheckpointLoader, plan: Plan) -> None:
    served = Loading(plan("a")).run()
    expected = generate(served, prompt=PROMPT, max_tokens=8)
    pool = harbour_of(loader).docks.pool
    free_bytes = pool.free_bytes
    load = Loading(plan("long"))
    load.cancel.set()
    with pytest.raises(TransferError, match="cancelled"):
        load.run()
    assert pool.free_bytes == free_bytes
    assert generate(served, prompt=PROMPT, max_tokens=8) == expected
    served.close()


@pytest.mark.slow
def test_a_thousand_swaps_leave_memory_as_ten_do(plan: Plan) -> None:
    planned = [plan("a"), plan("long")]
    free_bytes: list[int] = []
    for index in range(1000):
        loaded = Loading(planned[index % 2], host_bytes=ALL).run()
        generate(loaded, max_tokens=1)
        loaded.close()
        if index in (10, 999):
            torch.cuda.synchronize()
            free_bytes.append(torch.cuda.mem_get_info()[0])
    assert free_bytes[0] - free_bytes[1] <= free_bytes[0] // 100
