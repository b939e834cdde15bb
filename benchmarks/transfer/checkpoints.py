"""Checkpoints of published shapes with random weights, written as Hugging Face models are: config.json and shards."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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
    "qwen3-32b": {
        **_QWEN3,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "intermediate_size": 25600,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": 64,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "half-gigabyte": {
        **_QWEN3,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 3072,
        "vocab_size": 65536,
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


def write_model(shape: str, folder: Path, *, seed: int = 0, like: Path | None = None, is_sparse: bool = False) -> None:
    """Write a checkpoint of a shape of `CONFIGS` to a folder that is made.

    Args:
        shape: Name of the shape.
        folder: Where to.
        seed: Of the weights.
        like: A checkpoint of the same shape: this one is its sibling, which has its weights but for the last shard;
            the others are links.
        is_sparse: All weights are zero, and take no room on the disk.
    """
    config = CONFIGS[shape]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tile = b"" if is_sparse else _normal_bfloat16(seed)
    shards = _shards(config)
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {name: file for name, _ in tensors}
        if is_sparse:
            _write_hole(folder / file, tensors)
        elif like is not None and index < len(shards):
            os.link(like / file, folder / file)
        else:
            entries = ((name, "BF16", dims, _data(tile, name, dims)) for name, dims in sorted(tensors))
            write_safetensors(folder / file, entries)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")


def write_small_tensors(folder: Path, num_tensors: int, num_bytes: int) -> None:
    """Write a checkpoint of many tensors of one size, as a mixture of experts has them."""
    folder.mkdir(parents=True)
    tile = random.Random(0).randbytes(_TILE_BYTES)
    names = [f"expert.{index:05d}" for index in range(num_tensors)]
    entries = ((name, "U8", (num_bytes,), _cut(tile, name, num_bytes)) for name in names)
    write_safetensors(folder / "model.safetensors", entries)


Shard = list[tuple[str, tuple[int, ...]]]


def _shards(config: dict[str, object]) -> list[Shard]:
    shards: list[Shard] = [[]]
    shard_bytes = 0
    for name, dims in _tensors(config):
        if shard_bytes > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, dims))
        shard_bytes += 2 * math.prod(dims)
    return shards


def _write_hole(path: Path, tensors: Shard) -> None:
    """A safetensors file of zeros, which is a header and a hole."""
    header: dict[str, object] = {}
    end = 0
    for name, dims in sorted(tensors):
        num_bytes = 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


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
        if config["model_type"] == "qwen3":
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


def _normal_bfloat16(seed: int) -> bytes:
    values = np.random.default_rng(seed).standard_normal(_TILE_BYTES // 2, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def _data(tile: bytes, name: str, dims: tuple[int, ...]) -> Iterator[memoryview]:
    """Ones for a norm, else small numbers that differ from tensor to tensor."""
    if len(dims) == 1:
        yield memoryview(np.full(dims, 0x3F80, dtype="<u2").tobytes())
    else:
        yield from _cut(tile, name, 2 * math.prod(dims))


def _cut(tile: bytes, name: str, num_bytes: int) -> Iterator[memoryview]:
    """Bytes that differ from tensor to tensor: one random tile from a place that the name decides."""
    start = random.Random(name).randrange(len(tile) // 2) * 2
    view = memoryview(tile)
    while num_bytes > 0:
        piece = view[start : start + num_bytes]
        yield piece
        num_bytes -= len(piece)
        start = 0
