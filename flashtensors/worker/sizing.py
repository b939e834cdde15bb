"""How many bytes of KV cache a model gets.

With `kv_cache_size` set, that, in whole steps. Otherwise at least what one sequence needs (its whole context where
`max_model_len` is set, else up to `MIN_CONTEXT_TOKENS`), at most what `max_num_seqs` full sequences could use, and
between the two a share of the memory that is free beside the weights:

- embedded on a GPU (one model): all of it;
- a GPU under the daemon (models come and go): half, so that the next model finds room without an eviction;
- a CPU: a quarter, and never more than `MAX_CPU_KV_BYTES`, so that a laptop stays usable.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpoint.architecture import ModelConfig
from ..config import Settings
from ..errors import ConfigError
from ..residency.tiers import Demand
from .device import Device

MIN_CONTEXT_TOKENS = 4096
"""Context that a model must have room for when nobody set `max_model_len`."""
MAX_CPU_KV_BYTES = 4 * 1024**3


@dataclass(frozen=True, kw_only=True)
class KvSteps:
    """In which steps a KV cache comes."""

    block_size: int
    """Tokens in a block."""
    chunk_blocks: int
    """Blocks that lie together, for all layers; only whole chunks are used."""
    chunk_bytes: int
    step_bytes: int
    """Memory comes in multiples of this."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all layers."""
        return self.chunk_bytes // self.chunk_blocks

    def round_up(self, num_bytes: int) -> int:
        """`num_bytes` in whole steps."""
        return -(-num_bytes // self.step_bytes) * self.step_bytes

    def find_bytes(self, num_tokens: int) -> int:
        """Memory for one sequence of `num_tokens`."""
        num_chunks = -(-num_tokens // (self.block_size * self.chunk_blocks))
        return self.round_up(num_chunks * self.chunk_bytes)


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
    kv: KvSteps,
    max_model_len: int | None,
) -> Demand:
    """Memory that a model wants.

    Args:
        config: Its shape.
        settings: `kv_cache_size` and `max_num_seqs` come from here.
        device: Where it will run.
        weight_bytes: Bytes of its weights.
        kv: Steps of its KV cache.
        max_model_len: Most tokens in a sequence, where set.

    Raises:
        ConfigError: `kv_cache_size` holds no block.
    """
    if settings.kv_cache_size is not None:
        if settings.kv_cache_size < kv.block_bytes:
            raise ConfigError(
                f"kv_cache_size is {settings.kv_cache_size} bytes, but a block of {kv.block_size} tokens takes "
                f"{kv.block_bytes}; give it more",
                param="kv_cache_size",
            )
        whole_bytes = settings.kv_cache_size // kv.step_bytes * kv.step_bytes
        kv_bytes = max(whole_bytes, kv.find_bytes(1))
        return _demand(weight_bytes, kv_bytes, kv_bytes, kv)
    context = min(config.max_position_embeddings, max_model_len or config.max_position_embeddings)
    needed = context if max_model_len is not None else min(context, MIN_CONTEXT_TOKENS)
    min_bytes = kv.find_bytes(needed)
    max_bytes = settings.max_num_seqs * kv.find_bytes(context)
    if device.is_cpu:
        max_bytes = max(min_bytes, min(max_bytes, MAX_CPU_KV_BYTES))
    return _demand(weight_bytes, min_bytes, max_bytes, kv)


def _demand(weight_bytes: int, min_bytes: int, max_bytes: int, kv: KvSteps) -> Demand:
    return Demand(
        fixed_bytes=weight_bytes, min_flexible_bytes=min_bytes, max_flexible_bytes=max_bytes, step_bytes=kv.step_bytes
    )
