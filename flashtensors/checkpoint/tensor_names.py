"""Names and shapes of the tensors in a Hugging Face checkpoint of each supported architecture."""

from __future__ import annotations

from collections.abc import Iterator

from .architecture import ModelConfig
from .config_experts import ExpertsConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, in the order in which a forward pass needs them; q, k, v and gate, up are neighbours.

    A tied head is not listed. Names carry `config.weight_prefix`.
    """
    prefix = f"{config.weight_prefix}model."
    embedding = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": embedding}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"{prefix}layers.{layer}.{name}": shape for name, shape in _layer_shapes(config, layer)}
    shapes[f"{prefix}norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[f"{config.weight_prefix}lm_head.weight"] = embedding
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head_dim = config.hidden_size, config.head_dim
    query_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    yield "input_layernorm.weight", (hidden,)
    for name, size in (("q", query_size), ("k", kv_size), ("v", kv_size)):
        yield f"self_attn.{name}_proj.weight", (size, hidden)
    if config.attention_bias:
        for name, size in (("q", query_size), ("k", kv_size), ("v", kv_size)):
            yield f"self_attn.{name}_proj.bias", (size,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "self_attn.o_proj.weight", (hidden, query_size)
    if config.attention_output_bias:
        yield "self_attn.o_proj.bias", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if config.model_type == "gemma3_text":
        yield "pre_feedforward_layernorm.weight", (hidden,)
    if config.experts is not None and config.experts.layers[layer]:
        yield from _expert_shapes(config, config.experts)
    else:
        yield from _mlp_shapes(config)
    if config.model_type == "gemma3_text":
        yield "post_feedforward_layernorm.weight", (hidden,)


def _mlp_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    yield "mlp.gate_proj.weight", (intermediate, hidden)
    yield "mlp.up_proj.weight", (intermediate, hidden)
    if config.mlp_bias:
        yield "mlp.gate_proj.bias", (intermediate,)
        yield "mlp.up_proj.bias", (intermediate,)
    yield "mlp.down_proj.weight", (hidden, intermediate)
    if config.mlp_bias:
        yield "mlp.down_proj.bias", (hidden,)


def _expert_shapes(config: ModelConfig, experts: ExpertsConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The router, then gate and up of every expert, then down of every expert."""
    block, gate, up, down = _EXPERT_NAMES[config.model_type]
    yield f"{block}.gate.weight", (experts.num_experts, config.hidden_size)
    for expert in range(experts.num_experts):
        for name in (gate, up):
            yield f"{block}.experts.{expert}.{name}.weight", (experts.intermediate_size, config.hidden_size)
    for expert in range(experts.num_experts):
        yield f"{block}.experts.{expert}.{down}.weight", (config.hidden_size, experts.intermediate_size)


_EXPERT_NAMES = {
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
}
"""Module of the experts, and their gate, up and down."""
