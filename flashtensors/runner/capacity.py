"""What fits: bytes of KV cache, and the limits that follow from them."""

from __future__ import annotations

import msgspec
import torch

from ..checkpoint.architecture import ModelConfig
from ..errors import CapacityError, ConfigError
from ..kernels.attention.group_cost import GROUP_MEMBER_TOKENS, GROUP_MIN_BYTES, does_group_pay
from ..kernels.device_traits import has_fp8
from ..kernels.fp8 import FP8_DTYPE
from ..step import RunnerLimits
from .kv_layout import kv_block_bytes, layer_block_bytes

MIN_SEQUENCE_TOKENS = 256
"""Shortest sequence worth running: with room for less, a model is refused."""

_STEPS_IN_FLIGHT = {"cpu": 1, "cuda": 2}
"""A CPU computes a step while launching it, so looking ahead would only delay its result."""

_BLOCK_SIZES = {"cpu": 16, "cuda": 64}
"""Tokens in a block: a box that the GPU's memory accelerator fetches at once, or few enough to waste little."""

_TOKENS_PER_STEP = {"cpu": 2048, "cuda": 8192}
"""Tokens that a step computes at most, where nobody says: enough to be bound by arithmetic."""


def block_size(device: torch.device) -> int:
    """Tokens in a KV cache block on `device`."""
    return _BLOCK_SIZES[device.type]


def find_kv_dtype(wanted: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of KV caches on `device` that the setting `kv_cache_dtype` asks for, where weights are `dtype`.

    Raises:
        ConfigError: fp8 on a CPU, or on a GPU that does not convert it: before Ada.
    """
    if wanted == "auto":
        return dtype
    if device.type == "cpu":
        raise ConfigError(
            f"kv_cache_dtype is {wanted!r}, but on a CPU it must be auto: nothing there reads fp8 quickly",
            param="kv_cache_dtype",
        )
    if not has_fp8(device):
        raise ConfigError(
            f"kv_cache_dtype is {wanted!r}, but this GPU has no fp8 (Ada, Hopper and later have); leave it at auto",
            param="kv_cache_dtype",
        )
    return FP8_DTYPE


def choose_limits(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    kv_cache_bytes: int,
    max_model_len: int | None,
    max_num_seqs: int,
    max_tokens_per_step: int | None,
    block_size: int,
    device: torch.device,
) -> RunnerLimits:
    """Limits of a runner whose KV caches take at most `kv_cache_bytes`.

    Args:
        config: The model's shape.
        dtype: Of the caches.
        kv_cache_bytes: Memory for them.
        max_model_len: Most tokens in a sequence; None: what the model was trained for, as far as the caches hold it.
        max_num_seqs: Sequences that run at once.
        max_tokens_per_step: Tokens that one step may compute; None: what suits the device.
        block_size: Tokens in a block.
        device: Where the model runs.

    Raises:
        ConfigError: `max_model_len` is beyond what the model was trained for.
        CapacityError: The caches do not hold one sequence of `max_model_len`, or of `MIN_SEQUENCE_TOKENS`.
    """
    trained_len = config.max_position_embeddings
    if max_model_len is not None and max_model_len > trained_len:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but the model was trained for at most {trained_len} tokens; "
            "choose that or less",
            param="max_model_len",
        )
    block_bytes = kv_block_bytes(config, block_size, dtype)
    num_blocks = kv_cache_bytes // block_bytes
    needed_len = max_model_len or min(trained_len, MIN_SEQUENCE_TOKENS)
    if num_blocks * block_size < needed_len:
        needed_bytes = -(-needed_len // block_size) * block_bytes
        raise CapacityError(
            f"{kv_cache_bytes} bytes of KV cache hold {num_blocks * block_size} tokens, but a sequence of {needed_len} "
            f"needs {needed_bytes} bytes; raise kv_cache_size or gpu_memory_utilization, lower max_model_len, "
            "or unload another model"
        )
    limits = RunnerLimits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_slots=max_num_seqs,
        max_tokens_per_step=max_tokens_per_step or _TOKENS_PER_STEP[device.type],
        max_model_len=max_model_len or min(trained_len, num_blocks * block_size),
        max_steps_in_flight=_STEPS_IN_FLIGHT[device.type],
    )
    sees_all = not config.sliding_layers or not all(config.sliding_layers)
    if device.type == "cpu" or not sees_all:
        return limits
    return with_groups(limits, layer_block_bytes(config, block_size, dtype))


def with_groups(limits: RunnerLimits, block_bytes: int) -> RunnerLimits:
    """The limits with the measured rule of which shared prefixes are worth reading apart.

    Args:
        limits: Of the runner.
        block_bytes: Of a block in the KV cache of one layer.
    """
    token_bytes = block_bytes // limits.block_size
    most_blocks = limits.max_model_len // limits.block_size
    members = [
        number
        for number in range(2, limits.max_slots + 1)
        if does_group_pay(number, most_blocks * limits.block_size, token_bytes)
    ]
    blocks = [
        number
        for number in range(1, most_blocks + 1)
        if does_group_pay(limits.max_slots, number * limits.block_size, token_bytes)
    ]
    if not members or not blocks:
        return limits
    return msgspec.structs.replace(
        limits,
        group_min_members=members[0],
        group_min_blocks=blocks[0],
        group_cost_blocks=GROUP_MIN_BYTES / block_bytes,
        group_member_cost_blocks=GROUP_MEMBER_TOKENS / limits.block_size,
    )
