"""How much memory a model asks for, and where it may run."""

import pytest
import torch

from flashtensors.checkpoint.architecture import ModelConfig, parse_config
from flashtensors.config import Settings
from flashtensors.errors import ConfigError
from flashtensors.residency.tiers import Demand
from flashtensors.testing.checkpoints import tiny_config
from flashtensors.worker.checkpoint_loader import choose_dtype
from flashtensors.worker.device import Device, open_device
from flashtensors.worker.host_memory import available_host_bytes
from flashtensors.worker.sizing import MAX_CPU_KV_BYTES, MIN_CONTEXT_TOKENS, KvSteps, find_demand, kv_share

CPU = Device(name="cpu", description="fake", budget_bytes=0)
GPU = Device(name="cuda:0", description="fake", budget_bytes=0)
BLOCK_SIZE = 16
BLOCK_BYTES = 1000
KV = KvSteps(block_size=BLOCK_SIZE, chunk_blocks=1, chunk_bytes=BLOCK_BYTES, step_bytes=BLOCK_BYTES)


def config(context: int) -> ModelConfig:
    return parse_config(tiny_config("llama", max_position_embeddings=context), None, where="config.json")


def demand(
    context: int = 8192,
    *,
    device: Device = GPU,
    max_model_len: int | None = None,
    kv: KvSteps = KV,
    **settings: object,
) -> Demand:
    return find_demand(
        config(context),
        Settings(**settings),  # pyright: ignore
        device,
        weight_bytes=7,
        kv=kv,
        max_model_len=max_model_len,
    )


def test_a_set_kv_cache_is_taken_in_whole_blocks() -> None:
    wanted = demand(kv_cache_size=10_500)
    assert (wanted.fixed_bytes, wanted.min_flexible_bytes, wanted.max_flexible_bytes) == (7, 10_000, 10_000)


def test_a_kv_cache_without_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="a block of 16 tokens takes 1000"):
        demand(kv_cache_size=999)


@pytest.mark.parametrize(
    ("context", "max_model_len", "needed"),
    [(8192, None, MIN_CONTEXT_TOKENS), (8192, 6000, 6000), (512, None, 512), (8192, 100, 112)],
)
def test_the_least_is_one_useful_sequence(context: int, max_model_len: int | None, needed: int) -> None:
    wanted = demand(context, max_model_len=max_model_len)
    assert wanted.min_flexible_bytes == needed // BLOCK_SIZE * BLOCK_BYTES


def test_the_most_is_what_all_sequences_could_use() -> None:
    assert demand(512, max_num_seqs=3).max_flexible_bytes == 3 * 512 // BLOCK_SIZE * BLOCK_BYTES
    assert demand(512 * 2**15, max_num_seqs=256, device=CPU).max_flexible_bytes == MAX_CPU_KV_BYTES


def test_models_that_share_a_device_leave_room() -> None:
    assert [kv_share(GPU, is_embedded=True), kv_share(GPU, is_embedded=False)] == [1.0, 0.5]
    assert kv_share(CPU, is_embedded=True) == 0.25


def test_the_cpu_budget_is_a_share_of_what_is_available_or_what_was_set() -> None:
    half = open_device(Settings(device="cpu", gpu_memory_utilization=0.5)).budget_bytes
    assert 0.4 < half / available_host_bytes() < 0.6
    assert open_device(Settings(device="cpu", mem_pool_size=12345)).budget_bytes == 12345
    assert open_device(Settings(device="cpu", mem_pool_size=2**60)).budget_bytes < 2**50


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sees \d+ CUDA devices") as caught:
        open_device(Settings(device=f"cuda:{torch.cuda.device_count()}"))
    assert caught.value.param == "device"


@pytest.mark.parametrize(
    ("wanted", "stored", "is_cpu", "chosen"),
    [
        (None, "bfloat16", True, "bfloat16"),
        (None, "float16", True, "float32"),
        ("auto", "float16", False, "float16"),
        ("float16", "bfloat16", True, "float16"),
        ("float32", "float16", False, "float32"),
    ],
)
def test_dtype(wanted: str | None, stored: str, is_cpu: bool, chosen: str) -> None:
    assert choose_dtype(wanted, stored, is_cpu=is_cpu) == chosen


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        choose_dtype("int4", "bfloat16", is_cpu=True)
