"""A model's `config.json` as one checked value: what the rest of the package knows about an architecture."""

from __future__ import annotations

import msgspec

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""`model_type` values that the `models` room implements (`gemma3` is read as its text part)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Weight dtypes that run, with their size."""


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How rotary frequencies are stretched beyond the trained context."""

    rope_type: str
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    """Factor on embeddings (Gemma: sqrt(hidden_size), rounded to the weights' dtype)."""
    final_logit_softcap: float | None = None
    attention_logit_softcap: float | None = None
    dtype: str = "bfloat16"
    """Dtype of the weights in the checkpoint: a key of `DTYPE_BYTES`."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """From `generation_config.json` where it exists, else `config.json`."""
