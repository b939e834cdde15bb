"""A model's `config.json` as one checked value: what the rest of the package knows about an architecture."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import CheckpointError, UnsupportedModel
from .config_defaults import CONFIG_DEFAULTS
from .config_experts import MOE_MODEL_TYPES, ExpertsConfig, parse_experts
from .config_fields import ConfigFields
from .config_fp8 import Fp8Config, parse_fp8
from .config_rope import RopeScaling, context_length, parse_rope

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", *MOE_MODEL_TYPES)
"""`model_type` values that the `models` room implements (`gemma3` is read as its text part)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Weight dtypes that run, with their size."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a decoder-only language model. Sizes are numbers of elements."""

    model_type: str
    """One of `SUPPORTED_MODEL_TYPES`."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    """Tokens in the longest sequence, as `context_length` finds it."""
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    """Base frequency of sliding-window layers, where it differs (Gemma 3); they are never scaled."""
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    """`silu` or `gelu_pytorch_tanh`."""
    attention_bias: bool = False
    """q, k and v projections have a bias (Qwen2; also some Llamas, whose o projection then has one too)."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on each head of q and k before rope (Qwen3, Gemma 3)."""
    sliding_window: int | None = None
    """Tokens that a sliding-window layer sees, itself included."""
    sliding_layers: tuple[bool, ...] = ()
    """For each layer, whether it is a sliding-window layer; empty: none is."""
    query_scale: float | None = None
    """Scale of attention scores; None: head_dim ** -0.5."""
    embedding_scale: float = 1.0
    """Factor on embeddings (Gemma: sqrt(hidden_size)); the model rounds it to the dtype that it runs in."""
    final_logit_softcap: float | None = None
    attention_logit_softcap: float | None = None
    dtype: str = "bfloat16"
    """Dtype of the weights in the checkpoint, but for those of `quantization`: a key of `DTYPE_BYTES`."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """From `generation_config.json` where it exists, else `config.json`."""
    experts: ExpertsConfig | None = None
    """The experts of a mixture; None: every layer has a plain MLP."""
    quantization: Fp8Config | None = None
    """How projections are stored in fp8; None: every weight is of `dtype`."""
    weight_prefix: str = ""
    """What the checkpoint's tensor names begin with, before `model.`: text models inside multimodal ones have one."""

    def describe_dtype(self, dtype: str) -> str:
        """`dtype`, in which the model computes, with how its projections are stored where that differs."""
        return dtype if self.quantization is None else f"{dtype} (fp8 weights)"


_MAX_LAYERS = 4096
_MAX_CONFIG_BYTES = 16 * 1024**2


def read_model_config(folder: Path) -> ModelConfig:
    """Read `config.json`, and `generation_config.json` where it exists, in `folder`; raises as `parse_config`."""
    config = _read_object(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation_config = _read_object(generation_path) if generation_path.exists() else None
    return parse_config(config, generation_config, where=str(folder / "config.json"))


def _read_object(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes; it is no model's configuration")
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a model needs one, pull it again") from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as a JSON object: {error}; pull the model again") from error


def parse_config(config: dict[str, object], generation_config: dict[str, object] | None, *, where: str) -> ModelConfig:
    """The architecture that a Hugging Face configuration describes; other keys, as `auto_map`, are ignored.

    Args:
        config: Content of `config.json`, in the spelling of transformers 4 or 5.
        generation_config: Content of `generation_config.json`; wins over `config` for token ids.
        where: What messages call `config`: its path.

    Raises:
        UnsupportedModel: An architecture, rope type, activation, dtype or quantisation that does not run here.
        CheckpointError: A value of the wrong type or range.
    """
    top = ConfigFields(config, defaults={}, where=where)
    model_type = top.find_text("model_type")
    is_multimodal = model_type == "gemma3"
    if is_multimodal:
        model_type = "gemma3_text"
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModel(
            f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    text_config = config.get("text_config") if is_multimodal else config
    if not isinstance(text_config, dict):
        top.fail("text_config", "an object")
    shared = {key: config[key] for key in _SHARED_KEYS if config.get(key) is not None}
    fields = ConfigFields({**shared, **text_config}, defaults=CONFIG_DEFAULTS[model_type], where=where)
    return _parse_fields(fields, model_type, generation_config or {}, weight_prefix="language_model." * is_multimodal)


_SHARED_KEYS = ("torch_dtype", "dtype", "tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id")
"""Keys that a multimodal configuration may state beside its `text_config`."""


def _parse_fields(
    fields: ConfigFields, model_type: str, generation_config: dict[str, object], *, weight_prefix: str
) -> ModelConfig:
    _refuse_unsupported(fields)
    is_gemma = model_type == "gemma3_text"
    vocab_size = fields.size("vocab_size")
    sliding_layers = _parse_sliding_layers(fields, model_type)
    attention_bias = model_type == "qwen2" or (
        model_type not in ("mistral", "mixtral") and fields.flag("attention_bias")
    )
    bos_ids, eos_ids = _parse_token_ids(fields, generation_config, vocab_size)
    rope_theta, rope_scaling, rope_local_theta = parse_rope(fields, is_gemma=is_gemma)
    num_layers = fields.size("num_hidden_layers", maximum=_MAX_LAYERS)
    experts, quantization = parse_experts(fields, model_type, num_layers), parse_fp8(fields)
    if experts is not None and quantization is not None:
        raise UnsupportedModel(f"{fields.where}: experts in fp8 do not run here; pull the unquantised model")
    return ModelConfig(
        model_type=model_type,
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=num_layers,
        **_parse_heads(fields),
        vocab_size=vocab_size,
        max_position_embeddings=context_length(fields, rope_scaling),
        rms_norm_eps=fields.positive("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rope_local_theta=rope_local_theta,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        hidden_act=_parse_activation(fields, "hidden_activation" if is_gemma else "hidden_act"),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias and model_type != "qwen2",
        mlp_bias=model_type == "llama" and fields.flag("mlp_bias"),
        qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3_text"),
        sliding_window=fields.size("sliding_window") if any(sliding_layers) else None,
        sliding_layers=sliding_layers if any(sliding_layers) else (),
        query_scale=fields.positive("query_pre_attn_scalar") ** -0.5 if is_gemma else None,
        embedding_scale=fields.size("hidden_size") ** 0.5 if is_gemma else 1.0,
        final_logit_softcap=fields.find_positive("final_logit_softcapping") if is_gemma else None,
        attention_logit_softcap=fields.find_positive("attn_logit_softcapping") if is_gemma else None,
        dtype=_parse_dtype(fields),
        bos_token_id=bos_ids[0] if bos_ids else None,
        eos_token_ids=eos_ids,
        experts=experts,
        quantization=quantization,
        weight_prefix=weight_prefix,
    )


def _refuse_unsupported(fields: ConfigFields) -> None:
    if fields.flag("use_bidirectional_attention"):
        raise UnsupportedModel(f"{fields.where}: use_bidirectional_attention is set; only causal attention runs here")


def _parse_heads(fields: ConfigFields) -> dict[str, int]:
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.find_size("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.find_size("head_dim")
    if head_dim is None:
        if fields.size("hidden_size") % num_heads:
            fields.fail("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
        head_dim = fields.size("hidden_size") // num_heads
    if head_dim % 2:
        fields.fail("head_dim", "even, for rotary embeddings")
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}


def _parse_activation(fields: ConfigFields, key: str) -> str:
    activation = fields.find_text(key)
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise UnsupportedModel(f"{fields.where}: {key} {activation!r} is not supported; silu and gelu_pytorch_tanh are")
    return activation


def _parse_dtype(fields: ConfigFields) -> str:
    key = "dtype" if fields.find("dtype") is not None else "torch_dtype"
    dtype = (fields.find_text(key) or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModel(f"{fields.where}: {key} {dtype!r} is not supported; {', '.join(DTYPE_BYTES)} are")
    return dtype


def _parse_sliding_layers(fields: ConfigFields, model_type: str) -> tuple[bool, ...]:
    num_layers = fields.size("num_hidden_layers", maximum=_MAX_LAYERS)
    if model_type in ("llama", "mistral", "mixtral", "qwen3_moe"):
        has_window = model_type != "llama" and fields.find("sliding_window") is not None
        return (has_window and (model_type != "qwen3_moe" or fields.flag("use_sliding_window")),) * num_layers
    layer_types = fields.find("layer_types")
    if layer_types is not None:
        return _parse_layer_types(fields, layer_types, num_layers)
    if model_type == "gemma3_text":
        pattern = fields.size("sliding_window_pattern")
        return tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    if not fields.flag("use_sliding_window") or fields.find("sliding_window") is None:
        return (False,) * num_layers
    max_window_layers = fields.find("max_window_layers")
    if type(max_window_layers) is not int:
        fields.fail("max_window_layers", "a whole number")
    return tuple(layer >= max_window_layers for layer in range(num_layers))


def _parse_layer_types(fields: ConfigFields, layer_types: object, num_layers: int) -> tuple[bool, ...]:
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        fields.fail("layer_types", f"a list of {num_layers} attention types")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(
                f"{fields.where}: layer_types has {layer_type!r}; full_attention and sliding_attention are supported"
            )
    return tuple(layer_type == "sliding_attention" for layer_type in layer_types)


def _parse_token_ids(
    fields: ConfigFields, generation_config: dict[str, object], vocab_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that begin a text and that end one. Ids beyond the vocabulary cannot be drawn, so they are left out."""
    generation = ConfigFields(generation_config, defaults={}, where=f"{fields.where}: generation_config")
    bos_ids, eos_ids = (
        tuple(
            token_id for token_id in generation.token_ids(key) or fields.token_ids(key) or () if token_id < vocab_size
        )
        for key in ("bos_token_id", "eos_token_id")
    )
    return bos_ids, eos_ids
