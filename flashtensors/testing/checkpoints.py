"""Small random checkpoints in Hugging Face layout, for tests: no download, no torch, same bytes for the same seed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ..checkpoint.architecture import SUPPORTED_MODEL_TYPES, ModelConfig, parse_config
from ..checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, TensorToWrite, write_safetensors
from ..checkpoint.tensor_names import tensor_shapes
from ..errors import ConfigError

TINY_VOCAB_SIZE = 304
"""Vocabulary of `tiny_config`; `write_tiny_tokenizer` fills 300 of it, so that four ids have no text."""

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("Ġ", "a"),
    ("i", "n"),
    ("e", "r"),
    ("o", "n"),
    ("a", "n"),
    ("r", "e"),
    ("Ġ", "t"),
    ("e", "n"),
    ("a", "t"),
    ("o", "r"),
    ("Ġ", "s"),
    ("Ġ", "w"),
    ("e", "s"),
    ("i", "s"),
    ("Ġ", "o"),
    ("in", "g"),
    ("o", "u"),
    ("Ġ", "b"),
    ("l", "l"),
    ("e", "d"),
    ("Ġ", "c"),
    ("h", "e"),
    ("l", "o"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "hello"),
    ("Ġ", "Ġ"),
    ("ĠĠ", "ĠĠ"),
    ("o", "f"),
    ("Ġ", "of"),
    ("an", "d"),
    ("Ġ", "and"),
    ("i", "t"),
    ("a", "l"),
    ("a", "r"),
    ("s", "t"),
    ("u", "s"),
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_config(model_type: str, **overrides: object) -> dict[str, object]:
    """A `config.json` of a model with two or three layers; `overrides` replace or add keys.

    Args:
        model_type: A supported `model_type`; the configuration has the features that make it special: grouped
            query heads everywhere, a sliding window of 8 tokens in Mistral and in two of three Gemma layers,
            experts in Mixtral and in the second of two Qwen3-MoE layers.
    """
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(f"model_type is {model_type!r}, but it must be one of {', '.join(SUPPORTED_MODEL_TYPES)}")
    config: dict[str, object] = {
        "model_type": model_type,
        "architectures": [_CLASS_NAMES[model_type]],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": TINY_VOCAB_SIZE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return {**config, **_FAMILY_KEYS[model_type], **overrides}


_CLASS_NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_FAMILY_KEYS: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 32, "use_sliding_window": False},
    "qwen3_moe": {
        "head_dim": 32,
        "use_sliding_window": False,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        "tie_word_embeddings": True,
    },
}


def write_tiny_checkpoint(
    folder: Path, config: Mapping[str, object], *, seed: int = 0, dtype: str = "float32", num_shards: int = 1
) -> Path:
    """Write `config.json`, `generation_config.json` and random weights; returns `folder`, which is made.

    Args:
        config: As of `tiny_config`; any supported architecture.
        seed: Of the weights. They are scaled so that logits differ well from token to token.
        dtype: `float32`, `bfloat16` or `float16`; replaces the one in `config`.
        num_shards: More than one: shards with an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = {**config, "dtype": dtype}
    architecture = parse_config(written, None, where="tiny config")
    _write_json(folder / "config.json", written)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    _write_json(folder / "generation_config.json", ids)
    random = np.random.default_rng(seed)
    tensors = [
        _random_tensor(random, name, shape, architecture, dtype) for name, shape in tensor_shapes(architecture).items()
    ]
    if num_shards == 1:
        write_safetensors(folder / SINGLE_FILE, tensors, {"format": "pt"})
    else:
        _write_shards(folder, tensors, num_shards)
    return folder


def _random_tensor(
    random: np.random.Generator, name: str, shape: tuple[int, ...], config: ModelConfig, dtype: str
) -> TensorToWrite:
    values = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        centre = 0.0 if config.model_type == "gemma3_text" else 1.0  # Gemma multiplies by 1 + weight
        values = centre + 0.1 * values
    elif name.endswith(".bias"):
        values *= 0.1
    elif "embed_tokens" not in name:
        values *= 1.5 * shape[-1] ** -0.5
    elif config.tie_word_embeddings:
        values *= 0.05  # a tied head and large embeddings would answer every token with itself
    spelling, raw = _encode(values, dtype)
    return name, spelling, shape, raw


def _encode(values: np.ndarray, dtype: str) -> tuple[str, bytes]:
    if dtype == "float32":
        return "F32", values.astype("<f4").tobytes()
    if dtype == "float16":
        return "F16", values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    return "BF16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _write_shards(folder: Path, tensors: list[TensorToWrite], num_shards: int) -> None:
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = tensors[shard * len(tensors) // num_shards : (shard + 1) * len(tensors) // num_shards]
        write_safetensors(folder / name, part, {"format": "pt"})
        weight_map |= {tensor_name: name for tensor_name, *_ in part}
    _write_json(folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})


def write_tiny_tokenizer(folder: Path) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` with a ChatML template; returns `folder`, which is made.

    Byte-level BPE: `<|endoftext|>` (bos) 0, `<|im_start|>` 1, `<|im_end|>` (eos) 2, `<|pad|>` 3, all 256 bytes, then
    merges; 300 tokens. Any text goes round. No token is added to a text on its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in _MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    token_names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    options = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    _write_json(folder / "tokenizer_config.json", {**options, **token_names, "chat_template": _CHAT_TEMPLATE})
    return folder


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def iter_tiny_configs() -> Iterator[dict[str, object]]:
    """One tiny configuration for every supported architecture."""
    for model_type in SUPPORTED_MODEL_TYPES:
        yield tiny_config(model_type)
