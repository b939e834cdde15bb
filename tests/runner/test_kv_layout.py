"""Every block of every layer has memory of its own, near its neighbours, whatever the chunks are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.memory.arena import Arena
from flashtensors.runner.kv_layout import RUN_BYTES, KvLayout

CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=100,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
UNIT_BYTES = 2 * 4 * 8 * 4


@pytest.mark.parametrize(("chunk_blocks", "num_chunks"), [(1, 5), (4, 3), (8, 1)])
def test_blocks_of_all_layers_share_no_byte(chunk_blocks: int, num_chunks: int):
    layout = KvLayout(CONFIG, 4, torch.float32, chunk_blocks=chunk_blocks)
    num_blocks = chunk_blocks * num_chunks
    arena = Arena.allocate(layout.num_bytes(num_blocks) + layout.chunk_bytes - 1)
    arena.bytes_B.zero_()
    assert layout.num_blocks(arena.num_bytes) == num_blocks
    assert layout.chunk_bytes == chunk_blocks * 2 * 3 * UNIT_BYTES
    units = layout.unit_ids(np.arange(num_blocks, dtype=np.int32))
    assert units.dtype == np.int32
    caches = [tensor for pair in layout.caches(arena) for tensor in pair]
    assert len(caches) == 6
    for number, cache in enumerate(caches, start=1):
        assert cache.is_contiguous()
        assert cache.shape[1:] == (2, 4, 8)
        for block, unit in enumerate(units.tolist()):
            assert (cache[unit] == 0).all()
            cache[unit] = 1000 * number + block
    for number, cache in enumerate(caches, start=1):
        for block, unit in enumerate(units.tolist()):
            assert (cache[unit] == 1000 * number + block).all()
    used = arena.bytes_B[: layout.num_bytes(num_blocks)].view(torch.float32)
    assert (used > 0).all()  # no gaps: what is mapped is used


def test_the_first_blocks_lie_in_the_first_chunks():
    layout = KvLayout(CONFIG, 4, torch.float32, chunk_blocks=4)
    small, large = Arena.allocate(layout.chunk_bytes), Arena.allocate(5 * layout.chunk_bytes)
    for few, many in zip(layout.caches(small), layout.caches(large), strict=True):
        for a, b in zip(few, many, strict=True):
            assert a.data_ptr() - small.bytes_B.data_ptr() == b.data_ptr() - large.bytes_B.data_ptr()


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(16, torch.bfloat16), (64, torch.float32), (64, torch.float8_e4m3fn)]
)
def test_runs_of_a_layer_are_as_long_as_a_page_of_translation(block_size: int, dtype: torch.dtype):
    layout = KvLayout(CONFIG, block_size, dtype)
    unit_bytes = layout.unit_elements * dtype.itemsize
    assert RUN_BYTES <= layout.chunk_blocks * unit_bytes < 2 * RUN_BYTES
    assert layout.chunk_blocks & (layout.chunk_blocks - 1) == 0
