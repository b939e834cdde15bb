"""How many bytes of KV cache a model gets.

With `kv_cache_size` set, exactly that. Otherwise at least what one sequence needs (its whole context where
`max_model_len` is set, else up to `MIN_CONTEXT_TOKENS`), at most what `max_num_seqs` full sequences could use, and
between the two a share of the memory that is free beside the weights:

- embedded on a GPU (one model): all of it;
- a GPU under the daemon (models come and go): half, so that the next model finds room without an eviction;
- a CPU: a quarter, and never more than `MAX_CPU_KV_BYTES`, so that a laptop stays usable.
"""

from __future__ import annotations

from ..checkpoint.architecture import ModelConfig
from ..config import Settings
from ..errors import ConfigError
from ..residency.tiers import Demand
from .device import Device

BLOCK_SIZE = 16
"""Tokens in a KV cache block."""
MIN_CONTEXT_TOKENS = 4096
"""Context that a model must have room for when nobody set `max_model_len`."""
MAX_CPU_KV_BYTES = 4 * 1024**3


def kv_share(device: Device, *, is_embedded: bool) -> float:
    """Share of the free memory beside its weights that one model's KV cache takes."""
    if device.is_cpu:
        return 0.25
    return 1.0 if is_embedded else 0.5


def find_demand(
    config: ModelConfig,
    settings: Settings,
    device: Device,
    *,
    weight_bytes: int,
    block_bytes: int,
    max_model_len: int | None,
) -> Demand:
    """Memory that a model wants.

    Args:
        config: Its shape.
        settings: `kv_cache_size` and `max_num_seqs` come from here.
        device: Where it will run.
        weight_bytes: Bytes of its weights.
        block_bytes: Bytes of one KV cache block, all layers.
        max_model_len: Most tokens in a sequence, where set.

    Raises:
        ConfigError: `kv_cache_size` holds no block.
    """
    if settings.kv_cache_size is not None:
        kv_bytes = settings.kv_cache_size // block_bytes * block_bytes
        if kv_bytes == 0:
            raise ConfigError(
                f"kv_cache_size is {settings.kv_cache_size} bytes, but a block of {BLOCK_SIZE} tokens takes "
                f"{block_bytes}; give it more",
                param="kv_cache_size",
            )
        return Demand(fixed_bytes=weight_bytes, min_flexible_bytes=kv_bytes, max_flexible_bytes=kv_bytes)
    context = min(config.max_position_embeddings, max_model_len or config.max_position_embeddings)
    needed = context if max_model_len is not None else min(context, MIN_CONTEXT_TOKENS)
    min_bytes = _num_blocks(needed) * block_bytes
    max_bytes = settings.max_num_seqs * _num_blocks(context) * block_bytes
    if device.is_cpu:
        max_bytes = max(min_bytes, min(max_bytes, MAX_CPU_KV_BYTES))
    return Demand(fixed_bytes=weight_bytes, min_flexible_bytes=min_bytes, max_flexible_bytes=max_bytes)


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)
