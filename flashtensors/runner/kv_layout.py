"""Where keys and values of blocks lie, so that a KV cache grows and shrinks at one end of one range of addresses.

Memory is `[chunks, layers, 2, C, K, P, D]`: a chunk holds C blocks for all layers, and within it the keys of C blocks
of one layer lie together, then their values. The tensors that kernels see are, for each layer, one contiguous
`[units, K, P, D]` that begins at the layer's own keys (or values) in the first chunk; a unit is the size of one
block's keys in one layer. Block b is unit

    u(b) = b // C * (layers * 2 * C) + b % C

of every one of them, so whoever holds block ids maps them once and kernels know nothing of chunks.

Runs of C blocks take at least 2 MiB: with single blocks of all layers side by side, each layer touches as many pages of
address translation as the cache has blocks, which cost 11 % of the speed of decoding on an H200.

Shapes: C blocks in a chunk, K key-value heads, P tokens in a block, D head dim.
"""

from __future__ import annotations

import numpy as np
import torch

from ..checkpoint.architecture import ModelConfig
from ..memory.arena import Arena
from ..models.layers import KvCache
from ..step import RunnerLimits

RUN_BYTES = 2 * 1024**2
"""Least bytes of neighbouring keys of one layer: a page of the GPU's address translation."""


def layer_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that `block_size` tokens take in the KV cache of one layer."""
    return 2 * config.num_key_value_heads * config.head_dim * block_size * dtype.itemsize


def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that `block_size` tokens take in the KV caches of all layers."""
    return config.num_hidden_layers * layer_block_bytes(config, block_size, dtype)


class KvLayout:
    """The places of blocks in an arena.

    Args:
        config: The model's shape.
        block_size: Tokens in a block.
        dtype: Of the caches.
        chunk_blocks: Blocks in a chunk; None: the fewest, a power of two, whose keys take `RUN_BYTES`. A cache that
            never grows is one chunk.
    """

    def __init__(
        self, config: ModelConfig, block_size: int, dtype: torch.dtype, *, chunk_blocks: int | None = None
    ) -> None:
        self.unit_shape = (config.num_key_value_heads, block_size, config.head_dim)
        self.unit_elements = config.num_key_value_heads * block_size * config.head_dim
        self.num_layers = config.num_hidden_layers
        self.dtype = dtype
        unit_bytes = self.unit_elements * dtype.itemsize
        fewest = -(-RUN_BYTES // unit_bytes)
        self.chunk_blocks = chunk_blocks or 1 << (fewest - 1).bit_length()
        self.block_bytes = kv_block_bytes(config, block_size, dtype)
        self.chunk_bytes = self.chunk_blocks * self.block_bytes

    def num_blocks(self, num_bytes: int) -> int:
        """Blocks in the whole chunks that `num_bytes` hold."""
        return num_bytes // self.chunk_bytes * self.chunk_blocks

    def num_bytes(self, num_blocks: int) -> int:
        """Bytes of the chunks that hold `num_blocks`."""
        return -(-num_blocks // self.chunk_blocks) * self.chunk_bytes

    def unit_ids(self, block_ids: np.ndarray) -> np.ndarray:
        """What block tables on the device hold for `block_ids`, of any shape; the same dtype."""
        chunks, places = np.divmod(block_ids, self.chunk_blocks)
        return chunks * (2 * self.num_layers * self.chunk_blocks) + places

    def caches(self, arena: Arena) -> list[KvCache]:
        """Keys and values of each layer, `[units, K, P, D]`, over as many whole chunks as `arena` has addresses for.

        Units between a layer's own belong to other layers. What has no memory behind it yet may be part of the
        tensors as long as nobody reads it.
        """
        num_chunks = arena.num_bytes // self.chunk_bytes
        assert num_chunks > 0, f"an arena of {arena.num_bytes} bytes holds no chunk of {self.chunk_bytes}"
        units_per_chunk = 2 * self.num_layers * self.chunk_blocks
        num_units = (num_chunks - 1) * units_per_chunk + self.chunk_blocks
        all_units = arena.bytes_B[: num_chunks * self.chunk_bytes].view(self.dtype).view(-1, *self.unit_shape)
        first_units = range(0, units_per_chunk, self.chunk_blocks)
        tensors = [all_units[first : first + num_units] for first in first_units]
        return list(zip(tensors[::2], tensors[1::2], strict=True))


def place_kv_caches(
    config: ModelConfig, limits: RunnerLimits, device: torch.device, dtype: torch.dtype, kv_arena: Arena | None
) -> tuple[KvLayout, Arena | None, list[KvCache]]:
    """A runner's caches: chunks of `kv_arena`, or one chunk of an arena of its own, which is returned for it to close.

    Raises:
        CapacityError: No room for an arena of its own.
    """
    if kv_arena is not None:
        layout = KvLayout(config, limits.block_size, dtype)
        return layout, None, layout.caches(kv_arena)
    layout = KvLayout(config, limits.block_size, dtype, chunk_blocks=limits.num_blocks)
    arena = Arena.allocate(layout.chunk_bytes, device)
    return layout, arena, layout.caches(arena)
