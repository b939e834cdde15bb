"""The `config.json` and `generation_config.json` of a model that came as GGUF."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..errors import UnsupportedModel
from .config_fields import ConfigFields
from .gguf_header import GGUFHeader, GGUFTensor, MetadataValue

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
"""`general.architecture` to `model_type` and class name."""

_END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
_CONTROL = 3
_GEMMA3_27B_LAYERS = 62
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def make_config(header: GGUFHeader, rope_factors: np.ndarray | None) -> dict[str, object]:
    """`config.json` for the model in `header`, weights in bf16.

    Args:
        header: Of all parts together.
        rope_factors: Divisors of the rotary frequencies, where the file has them (`rope_freqs.weight`).

    Raises:
        UnsupportedModel: An architecture, or a feature of one, that does not run here.
        CheckpointError: A value of the wrong type or range.
    """
    fields = _architecture_fields(header)
    architecture = str(header.metadata["general.architecture"])
    model_type, class_name = ARCHITECTURES[architecture]
    num_heads, hidden_size = fields.size("attention.head_count"), fields.size("embedding_length")
    head_dim = fields.find_size("attention.key_length") or hidden_size // num_heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (fields.find_size(key) or head_dim) != head_dim:
            raise UnsupportedModel(
                f"{fields.where}: {key} differs from the head dimension {head_dim}, which does not run"
            )
    config: dict[str, object] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.find_size("attention.head_count_kv") or num_heads,
        "head_dim": head_dim,
        "vocab_size": _vocab_size(header),
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": _shortest_float32(fields.positive("attention.layer_norm_rms_epsilon")),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "bfloat16",
        **_token_ids(header.metadata),
    }
    if model_type == "gemma3_text":
        return {**config, **_gemma_keys(fields, num_heads, hidden_size, head_dim)}
    theta = _shortest_float32(fields.find_positive("rope.freq_base") or 10_000.0)
    scaling = _rope_scaling(fields) if rope_factors is None else _llama3_scaling(fields, rope_factors, theta, head_dim)
    return {**config, "hidden_act": "silu", "rope_parameters": {"rope_theta": theta, **scaling}}


def make_generation_config(header: GGUFHeader) -> dict[str, object]:
    """`generation_config.json`: the tokens that begin, end and pad a text."""
    return _token_ids(header.metadata)


def _architecture_fields(header: GGUFHeader) -> ConfigFields:
    """Metadata under the architecture's own prefix, without it; single-valued arrays are unpacked."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{header.path}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    values = {
        key.removeprefix(prefix): value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    if values.get("expert_count"):
        raise UnsupportedModel(f"{header.path}: {prefix}expert_count is set; mixtures of experts do not run here")
    return ConfigFields(values, defaults={}, where=str(header.path))


def _vocab_size(header: GGUFHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UnsupportedModel(f"{header.path}: there is no tensor 'token_embd.weight'; it is no language model")
    return embedding.shape[0]


def _shortest_float32(value: float) -> float:
    """The decimal that a float32 stands for: GGUF holds 1e-05 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _token_ids(metadata: Mapping[str, MetadataValue]) -> dict[str, object]:
    """Ids by their names in Hugging Face configurations; every token that ends a turn is an end of text.

    Besides those that the metadata names, control tokens known to end a turn are taken, as llama.cpp does: many files
    name but one of several.
    """
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    named = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    known: list[int] = []
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = zip(tokens, types, strict=False)
        known = [index for index, pair in enumerate(pairs) if pair[1] == _CONTROL and pair[0] in _END_TOKENS]
    end_ids = dict.fromkeys(token_id for token_id in (*named, *known) if isinstance(token_id, int))
    ids: dict[str, object] = {"eos_token_id": list(end_ids)}
    for key, name in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int):
            ids[key] = value
    return ids


def _gemma_keys(fields: ConfigFields, num_heads: int, hidden_size: int, head_dim: int) -> dict[str, object]:
    # As in llama.cpp: only the 27B model scales queries by another size than that of its heads.
    is_27b = fields.size("block_count") == _GEMMA3_27B_LAYERS
    pattern = fields.find_size("attention.sliding_window_pattern") or 6
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden_size // num_heads if is_27b else head_dim,
        "sliding_window": fields.size("attention.sliding_window"),
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
            for layer in range(fields.size("block_count", maximum=4096))
        ],
        "rope_parameters": {
            "full_attention": {
                "rope_theta": _shortest_float32(fields.find_positive("rope.freq_base") or 1_000_000.0),
                **_rope_scaling(fields),
            },
            "sliding_attention": {
                "rope_theta": _shortest_float32(fields.find_positive("rope.freq_base_swa") or 10_000.0),
                "rope_type": "default",
            },
        },
        "final_logit_softcapping": fields.find_positive("final_logit_softcapping"),
        "attn_logit_softcapping": fields.find_positive("attn_logit_softcapping"),
    }


def _rope_scaling(fields: ConfigFields) -> dict[str, object]:
    kind = fields.find_text("rope.scaling.type") or "none"
    factor = fields.find_positive("rope.scaling.factor") or fields.find_positive("rope.scale_linear") or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{fields.where}: rope scaling {kind!r} is not supported; none, linear and yarn are")
    if factor == 1.0:
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor} if kind != "yarn" else _yarn_scaling(fields, factor)


def _yarn_scaling(fields: ConfigFields, factor: float) -> dict[str, object]:
    """Parameters of YaRN; what llama.cpp adds to those of Hugging Face must be neutral."""
    for name, neutral in (
        ("attn_factor", 1),
        ("yarn_attn_factor", 1),
        ("yarn_ext_factor", 1),
        ("yarn_log_multiplier", 0),
    ):
        key = f"rope.scaling.{name}"
        if fields.find(key) not in (None, neutral):
            raise UnsupportedModel(f"{fields.where}: {key} is {fields.find(key)}; only {neutral} runs here")
    original = fields.find_size("rope.scaling.original_context_length") or fields.size("context_length")
    return {
        "rope_type": "yarn",
        "factor": _shortest_float32(factor),
        "original_max_position_embeddings": original,
        "beta_fast": _shortest_float32(fields.find_positive("rope.scaling.yarn_beta_fast") or 32.0),
        "beta_slow": _shortest_float32(fields.find_positive("rope.scaling.yarn_beta_slow") or 1.0),
    }


def _llama3_scaling(fields: ConfigFields, rope_factors: np.ndarray, theta: float, head_dim: int) -> dict[str, object]:
    """Parameters of Llama 3's scaling, which GGUF holds only as the factors that came out of them.

    The largest factor is the parameter; the other parameters have been the same in every release. They are put in
    and must give the factors back.
    """
    factor = float(np.maximum(rope_factors.max(), 1.0))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    original = _LLAMA3_ROPE["original_max_position_embeddings"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if rope_factors.shape != expected.shape or not np.allclose(rope_factors, expected, rtol=1e-4, atol=0.0):
        raise UnsupportedModel(f"{fields.where}: the factors in 'rope_freqs.weight' are not those of Llama 3's scaling")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}


def find_rope_factors(header: GGUFHeader) -> GGUFTensor | None:
    """The tensor of rotary divisors; None when the model has none."""
    return header.tensors.get("rope_freqs.weight")
