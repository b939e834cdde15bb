"""Writes small GGUF files as llama.cpp's converter would, from Hugging Face checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from flashtensors.checkpoint.architecture import ModelConfig, read_model_config
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
QUANTIZATION = gguf.GGMLQuantizationType


def tiny_weights(folder: Path, model_type: str, **overrides: object) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A tiny checkpoint's configuration and fp32 weights."""
    write_tiny_checkpoint(folder, tiny_config(model_type, **overrides))
    tensors = open_checkpoint(folder).tensors.values()
    content = (folder / "model.safetensors").read_bytes()
    weights = {
        tensor.name: np.frombuffer(content, "<f4", tensor.num_bytes // 4, tensor.offset).reshape(tensor.shape)
        for tensor in tensors
    }
    return read_model_config(folder), weights


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama_cpp_tensor(name: str, weight: np.ndarray, config: ModelConfig) -> tuple[str, np.ndarray]:
    """Name and values of a Hugging Face tensor in a GGUF file, by the `gguf` library's own table of names."""
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stem, _, kind = name.rpartition(".")
    new_name = names.get_name(stem)
    assert new_name is not None
    if config.model_type == "llama" and ".q_proj" in name:
        weight = interleave(weight, config.num_attention_heads)
    elif config.model_type == "llama" and ".k_proj" in name:
        weight = interleave(weight, config.num_key_value_heads)
    elif config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        weight = weight + 1
    return f"{new_name}.{kind}", weight


TINY_TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_end|>", "a", "b", "ab", "Ġ", "<think>"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


def tiny_metadata(config: ModelConfig) -> dict[str, Any]:
    """What llama.cpp's converter writes about the shape of a model."""
    prefix = ARCHITECTURES[config.model_type]
    shape = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if config.sliding_window is not None:
        shape |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": 3}
    return {**{f"{prefix}.{key}": value for key, value in shape.items()}, **TINY_TOKENIZER}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    quantization: QUANTIZATION = QUANTIZATION.F32,
) -> Path:
    """Write a file with the library's writer; matrices are quantised, vectors are not."""
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in metadata.items():
        kinds.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        if values.ndim == 1 or quantization == QUANTIZATION.F32:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(name, quantize(np.ascontiguousarray(values), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_gguf(
    folder: Path, model_type: str, *, quantization: QUANTIZATION = QUANTIZATION.F32, **overrides: object
) -> tuple[Path, ModelConfig, dict[str, np.ndarray]]:
    """A file, the configuration and the Hugging Face weights that it was made from."""
    config, weights = tiny_weights(folder / "source", model_type, **overrides)
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    path = write_gguf(
        folder / "tiny.gguf", ARCHITECTURES[model_type], tiny_metadata(config), tensors, quantization=quantization
    )
    return path, config, weights
