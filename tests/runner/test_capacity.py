"""Limits that follow from memory, and refusals that say how much is needed."""

from __future__ import annotations

import msgspec
import pytest
import torch

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.errors import CapacityError, ConfigError
from flashtensors.kernels.attention.group_cost import does_group_pay
from flashtensors.runner import capacity
from flashtensors.runner.capacity import choose_limits, find_kv_dtype
from flashtensors.runner.kv_layout import kv_block_bytes
from flashtensors.step import RunnerLimits

CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
BLOCK_BYTES = 2 * 3 * 2 * 16 * 16 * 2  # keys and values, layers, heads, tokens, head dim, bytes


def limits_for(
    kv_cache_bytes: int,
    max_model_len: int | None = None,
    device: str = "cpu",
    *,
    max_tokens_per_step: int | None = 512,
) -> RunnerLimits:
    return choose_limits(
        CONFIG,
        dtype=torch.bfloat16,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_tokens_per_step=max_tokens_per_step,
        block_size=16,
        device=torch.device(device),
    )


def test_block_bytes():
    assert kv_block_bytes(CONFIG, 16, torch.bfloat16) == BLOCK_BYTES
    assert kv_block_bytes(CONFIG, 16, torch.float32) == 2 * BLOCK_BYTES


@pytest.mark.parametrize(("device", "expected"), [("cpu", 2048), ("cuda", 8192)])
def test_a_step_is_as_large_as_suits_the_device(device: str, expected: int) -> None:
    limits = limits_for(1000 * BLOCK_BYTES, device=device, max_tokens_per_step=None)
    assert limits.max_tokens_per_step == expected


def test_an_fp8_cache_is_half_as_large_and_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(capacity, "has_fp8", lambda device: True)
    fp8 = find_kv_dtype("fp8", torch.bfloat16, cuda)
    assert 2 * kv_block_bytes(CONFIG, 16, fp8) == BLOCK_BYTES
    assert find_kv_dtype("auto", torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ConfigError, match="on a CPU it must be auto") as failure:
        find_kv_dtype("fp8", torch.bfloat16, torch.device("cpu"))
    assert failure.value.param == "kv_cache_dtype"
    monkeypatch.setattr(capacity, "has_fp8", lambda device: False)
    with pytest.raises(ConfigError, match="has no fp8"):
        find_kv_dtype("fp8", torch.bfloat16, cuda)
    assert find_kv_dtype("auto", torch.bfloat16, cuda) == torch.bfloat16


def test_limits_fill_the_memory():
    limits = limits_for(1000 * BLOCK_BYTES + 5)
    assert limits.num_blocks == 1000
    assert (limits.block_size, limits.max_slots, limits.max_tokens_per_step) == (16, 8, 512)
    assert limits.max_model_len == 1024


def test_the_context_is_bounded_by_memory_unless_it_was_asked_for():
    assert limits_for(40 * BLOCK_BYTES).max_model_len == 640
    assert limits_for(40 * BLOCK_BYTES, 600).max_model_len == 600
    with pytest.raises(CapacityError, match=f"a sequence of 641 needs {41 * BLOCK_BYTES} bytes"):
        limits_for(40 * BLOCK_BYTES, 641)


def test_memory_for_less_than_a_sensible_sequence_is_refused():
    assert limits_for(16 * BLOCK_BYTES).max_model_len == 256
    with pytest.raises(CapacityError, match="hold 240 tokens, but a sequence of 256"):
        limits_for(16 * BLOCK_BYTES - 1)
    assert limits_for(BLOCK_BYTES, 10).max_model_len == 10


def test_more_context_than_trained_is_refused():
    with pytest.raises(ConfigError, match="trained for at most 1024"):
        limits_for(1000 * BLOCK_BYTES, 1025)


def test_a_device_looks_one_step_ahead():
    assert limits_for(40 * BLOCK_BYTES).max_steps_in_flight == 1
    assert limits_for(40 * BLOCK_BYTES, device="cuda").max_steps_in_flight == 2


def test_groups_are_those_that_were_measured_to_pay() -> None:
    kv_cache_bytes, token_bytes = 9000 * BLOCK_BYTES, 2 * 2 * 16 * 2
    long = msgspec.structs.replace(CONFIG, max_position_embeddings=100_000)
    limits = choose_limits(
        long,
        dtype=torch.bfloat16,
        kv_cache_bytes=kv_cache_bytes,
        max_model_len=None,
        max_num_seqs=64,
        max_tokens_per_step=None,
        block_size=16,
        device=torch.device("cuda"),
    )
    for num_members in range(2, 65):
        for num_blocks in (1, 10, 500, 2000, 6000):
            pays = does_group_pay(num_members, num_blocks * 16, token_bytes)
            assert (limits.group_gain(num_members, num_blocks) >= 0) == pays, (num_members, num_blocks)
    assert limits_for(kv_cache_bytes).group_min_members == 0
    assert limits_for(kv_cache_bytes, device="cuda").group_min_members == 0, "no prefix of 1024 such tokens pays"
