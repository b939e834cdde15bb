"""Checkpoints of published shapes with random bytes, written as Hugging Face models are: config.json and shards."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

from flashtensors.checkpoint.safetensors import write_safetensors

SHARD_BYTES = 4 * 1024**3
_TILE_BYTES = 64 * 1024**2

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
CONFIGS = {
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "tiny": {
        **_QWEN3,
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "intermediate_size": 768,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
}
"""What config.json says, by name of the shape."""


def write_model(shape: str, folder: Path) -> None:
    """Write a checkpoint of a shape of `CONFIGS` to a folder that is made."""
    config = CONFIGS[shape]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tile = random.Random(0).randbytes(_TILE_BYTES)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    shard_bytes = 0
    for name, dims in _tensors(config):
        if shard_bytes > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, dims))
        shard_bytes += 2 * math.prod(dims)
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {name: file for name, _ in tensors}
        entries = ((name, "BF16", dims, _data(tile, name, 2 * math.prod(dims))) for name, dims in sorted(tensors))
        write_safetensors(folder / file, entries)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")


def write_small_tensors(folder: Path, num_tensors: int, num_bytes: int) -> None:
    """Write a checkpoint of many tensors of one size, as a mixture of experts has them."""
    folder.mkdir(parents=True)
    tile = random.Random(0).randbytes(_TILE_BYTES)
    names = [f"expert.{index:05d}" for index in range(num_tensors)]
    entries = ((name, "U8", (num_bytes,), _data(tile, name, num_bytes)) for name in names)
    write_safetensors(folder / "model.safetensors", entries)


def _tensors(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    def size(key: str) -> int:
        value = config[key]
        assert isinstance(value, int)
        return value

    hidden, head, inner, vocab = (size(key) for key in ("hidden_size", "head_dim", "intermediate_size", "vocab_size"))
    queries, keys = head * size("num_attention_heads"), head * size("num_key_value_heads")
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(size("num_hidden_layers")):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}.self_attn.q_norm.weight", (head,)
        yield f"{prefix}.self_attn.k_norm.weight", (head,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _data(tile: bytes, name: str, num_bytes: int) -> Iterator[memoryview]:
    """Bytes that differ from tensor to tensor: one random tile from a place that the name decides."""
    start = random.Random(name).randrange(len(tile))
    view = memoryview(tile)
    while num_bytes > 0:
        piece = view[start : start + num_bytes]
        yield piece
        num_bytes -= len(piece)
        start = 0
