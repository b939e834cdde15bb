"""A checkpoint that went through llama.cpp's spelling comes back as it was."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from flashtensors.checkpoint import gguf as module
from flashtensors.checkpoint.architecture import ModelConfig, read_model_config
from flashtensors.checkpoint.gguf import convert_gguf
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.errors import CheckpointError, DiskFull, UnsupportedModel

from .gguf_files import (
    ARCHITECTURES,
    QUANTIZATION,
    llama_cpp_tensor,
    tiny_metadata,
    tiny_weights,
    write_gguf,
    write_tiny_gguf,
)

YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
FEATURES: list[tuple[str, dict[str, object]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 32}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("gemma3_text", {}),
]


def bits(values: np.ndarray) -> np.ndarray:
    """Torch's rounding to bf16, as bits."""
    return torch.from_numpy(np.array(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def converted_bits(folder: Path) -> dict[str, np.ndarray]:
    tensors = open_checkpoint(folder).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    return {
        name: np.fromfile(tensor.path, "<u2", tensor.num_bytes // 2, offset=tensor.offset).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], bits(values), err_msg=name)


@pytest.mark.parametrize(("model_type", "overrides"), FEATURES)
def test_weights_and_configuration_come_back(tmp_path: Path, model_type: str, overrides: dict[str, object]) -> None:
    path, config, weights = write_tiny_gguf(tmp_path, model_type, **overrides)
    convert_gguf([path], tmp_path / "out")
    if model_type == "gemma3_text":  # 1 was added and taken off in fp32
        weights = {name: (w + 1) - 1 if name.endswith("norm.weight") else w for name, w in weights.items()}
    assert_equal(converted_bits(tmp_path / "out"), weights)
    expected = msgspec.structs.replace(config, dtype="bfloat16", bos_token_id=0, eos_token_ids=(1, 0))
    assert read_model_config(tmp_path / "out") == expected


@pytest.mark.parametrize("quantization", [QUANTIZATION.Q8_0, QUANTIZATION.Q4_0, QUANTIZATION.F16, QUANTIZATION.BF16])
def test_quantised_rows_go_back_to_their_places(tmp_path: Path, quantization: QUANTIZATION) -> None:
    path, _, weights = write_tiny_gguf(tmp_path, "llama", quantization=quantization)
    convert_gguf([path], tmp_path / "out")
    expected = {
        name: dequantize(quantize(weight, quantization), quantization) if weight.ndim > 1 else weight
        for name, weight in weights.items()
    }
    assert_equal(converted_bits(tmp_path / "out"), expected)


def test_tensors_follow_each_other_in_the_order_of_execution(tmp_path: Path) -> None:
    path, _, _ = write_tiny_gguf(tmp_path, "qwen3")
    convert_gguf([path], tmp_path / "out")
    names = [name.removeprefix("model.layers.0.") for name in open_checkpoint(tmp_path / "out").tensors]
    assert names[:13] == [
        "model.embed_tokens.weight",
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.o_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
    ]
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_large_model_becomes_shards_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 60_000)
    monkeypatch.setattr(module, "_SLAB_ELEMENTS", 1000)
    path, _, weights = write_tiny_gguf(tmp_path, "qwen2")
    told: list[tuple[int, int]] = []
    convert_gguf([path], tmp_path / "out", lambda done, total: told.append((done, total)))
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert max(shard.stat().st_size for shard in shards) < 60_000 + 2 * 4096
    assert_equal(converted_bits(tmp_path / "out"), weights)
    num_bytes = sum(weight.size * 2 for weight in weights.values())
    assert told[-1] == (num_bytes, num_bytes)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def split(folder: Path, config: ModelConfig, tensors: dict[str, np.ndarray], count: int) -> list[Path]:
    names = list(tensors)
    paths = []
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        keys = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        metadata = {**tiny_metadata(config), **keys} if number == 0 else keys
        paths.append(write_gguf(folder / f"part-{number}.gguf", ARCHITECTURES[config.model_type], metadata, part))
    return paths


def test_parts_of_a_split_file_are_joined_in_any_order(tmp_path: Path) -> None:
    config, weights = tiny_weights(tmp_path / "source", "qwen3")
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    parts = split(tmp_path, config, tensors, 3)
    convert_gguf([parts[2], parts[0], parts[1]], tmp_path / "out")
    assert_equal(converted_bits(tmp_path / "out"), weights)
    for wrong in ([], parts[:1], parts[1:], [parts[0], parts[1], parts[1]], [*parts, parts[0]]):
        with pytest.raises(CheckpointError):
            convert_gguf(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500_000.0}
    config, weights = tiny_weights(
        tmp_path / "source", "llama", rope_parameters=scaling, max_position_embeddings=131072
    )
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    frequencies = llama_cpp_factors(config)
    path = write_gguf(
        tmp_path / "a.gguf", "llama", tiny_metadata(config), {**tensors, "rope_freqs.weight": frequencies}
    )
    convert_gguf([path], tmp_path / "out")
    found = read_model_config(tmp_path / "out")
    assert (found.rope_scaling, found.rope_theta) == (config.rope_scaling, config.rope_theta)
    for wrong in (frequencies[::-1], frequencies[1:], np.zeros_like(frequencies), frequencies * np.nan):
        path = write_gguf(tmp_path / "b.gguf", "llama", tiny_metadata(config), {**tensors, "rope_freqs.weight": wrong})
        with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
            convert_gguf([path], tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "expected", "context"),
    [
        ({}, {"factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (
            {"factor": 1.3, "original_context_length": 1000, "yarn_beta_fast": 16.0, "yarn_beta_slow": 0.3},
            {"factor": 1.3, "original_max_position_embeddings": 1000, "beta_fast": 16.0, "beta_slow": 0.3},
            1300,
        ),
        ({"yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}, {"factor": 4.0}, 512),
    ],
)
def test_yarn_comes_back_as_it_was(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any], context: int
) -> None:
    config, weights = tiny_weights(tmp_path / "source", "llama", max_position_embeddings=128)
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    metadata = {**tiny_metadata(config), **YARN}
    metadata |= {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
    convert_gguf([write_gguf(tmp_path / "a.gguf", "llama", metadata, tensors)], tmp_path / "out")
    found = read_model_config(tmp_path / "out")
    assert found.rope_scaling is not None
    assert found.rope_scaling.rope_type == "yarn"
    assert {key: getattr(found.rope_scaling, key) for key in expected} == expected
    assert (found.max_position_embeddings, found.rope_scaling.attention_factor) == (context, None)


def llama_cpp_factors(config: ModelConfig) -> np.ndarray:
    """`generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py."""
    scaling = config.rope_scaling
    assert scaling is not None
    low_wavelength = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high_wavelength = scaling.original_max_position_embeddings / scaling.high_freq_factor
    factors = []
    for index in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (index / config.head_dim)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(scaling.factor)
        else:
            smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"general.architecture": "mamba"}, UnsupportedModel, "architecture 'mamba' is not supported; supported are"),
        ({"llama.expert_count": 8}, UnsupportedModel, "mixtures of experts"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModel, "rope scaling 'longrope'"),
        (
            {**YARN, "llama.rope.scaling.yarn_attn_factor": 1.5},
            UnsupportedModel,
            "rope.scaling.yarn_attn_factor is 1.5",
        ),
        ({**YARN, "llama.rope.scaling.yarn_ext_factor": 0.0}, UnsupportedModel, "rope.scaling.yarn_ext_factor is 0.0"),
        ({**YARN, "llama.rope.scaling.factor": 0.5}, CheckpointError, "factor is 0.5"),
        ({**YARN, "llama.rope.scaling.original_context_length": "4k"}, CheckpointError, "context_length is '4k'"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModel, "rope.dimension_count"),
        ({"llama.block_count": 3}, CheckpointError, "tensor 'blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1}, UnsupportedModel, "has no tensor 'blk.1."),
        ({"llama.block_count": 10**9}, CheckpointError, "num_hidden_layers"),
        ({"llama.embedding_length": 32}, CheckpointError, "has shape [304, 64], but the metadata makes it [304, 32]"),
        ({"llama.attention.head_count": "four"}, CheckpointError, "attention.head_count is 'four'"),
        ({"llama.attention.head_count_kv": [2, 1]}, CheckpointError, "attention.head_count_kv is [2, 1]"),
        ({"tokenizer.ggml.model": "bert"}, UnsupportedModel, "tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "tekken"}, UnsupportedModel, "'tekken' is not supported"),
        ({"tokenizer.ggml.tokens": "none"}, CheckpointError, "tokens is not a list"),
        ({"tokenizer.ggml.merges": ["a c"]}, CheckpointError, "'a c' names what is no token"),
        ({"tokenizer.ggml.token_type": [1]}, CheckpointError, "1 token types"),
        ({"tokenizer.ggml.eos_token_id": 99}, CheckpointError, "eos_token_id is 99"),
    ],
)
def test_what_cannot_be_converted_is_named(
    tmp_path: Path, changes: dict[str, Any], error: type[CheckpointError], says: str
) -> None:
    config, weights = tiny_weights(tmp_path / "source", "llama")
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    metadata = {**tiny_metadata(config), **changes}
    path = write_gguf(tmp_path / "a.gguf", metadata.pop("general.architecture", "llama"), metadata, tensors)
    with pytest.raises(error) as caught:
        convert_gguf([path], tmp_path / "out")
    assert says in caught.value.message
    assert str(path) in caught.value.message


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    path, _, _ = write_tiny_gguf(tmp_path, "llama", vocab_size=5)
    with pytest.raises(CheckpointError, match="7 tokens, but embeddings for 5"):
        convert_gguf([path], tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path, _, _ = write_tiny_gguf(tmp_path, "llama")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskFull, match=r"model\.safetensors"):
        convert_gguf([path], tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_not_a_number_stays_what_it_is(tmp_path: Path) -> None:
    config, weights = tiny_weights(tmp_path / "source", "llama")
    norm = weights["model.norm.weight"].copy()
    norm[:6] = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x3F808000], "<u4").view("<f4")
    weights["model.norm.weight"] = norm
    tensors = dict(llama_cpp_tensor(name, weight, config) for name, weight in weights.items())
    path = write_gguf(tmp_path / "a.gguf", "llama", tiny_metadata(config), tensors)
    convert_gguf([path], tmp_path / "out")
    found = converted_bits(tmp_path / "out")["model.norm.weight"]
    assert found[:6].tolist() == [0x7FC0, 0x7FC0, 0x7FC0, 0x7F80, 0x7F80, 0x3F80]
    np.testing.assert_array_equal(found[6:], bits(norm[6:]))


def test_the_other_files(tmp_path: Path) -> None:
    path, _, _ = write_tiny_gguf(tmp_path, "llama")
    convert_gguf([path], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": [1, 0],
        "bos_token_id": 0,
    }
    options = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert options["chat_template"] == "{{ messages[0]['content'] }}"
    assert (options["bos_token"], options["eos_token"]) == ("<|endoftext|>", "<|im_end|>")
    assert (options["add_bos_token"], options["add_eos_token"]) == (False, False)
