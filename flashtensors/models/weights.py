"""The weights of a decoder: the names it computes with, and the checkpoint tensors that make them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoint.architecture import ModelConfig
from ..checkpoint.layout import Weight, WeightLayout
from .family import Family


def decoder_layout(config: ModelConfig, family: Family) -> WeightLayout:
    """All weights in execution order; q, k, v and gate, up are fused by rows.

    All experts of a layer are two weights: gate 0, up 0, gate 1, up 1 …, and down 0, down 1 …, by rows.
    """
    prefix = f"{config.weight_prefix}model"
    vocabulary = (config.vocab_size, config.hidden_size)
    weights = [_single("embedding.weight", f"{prefix}.embed_tokens.weight", vocabulary)]
    for layer in range(config.num_hidden_layers):
        weights += _layer_weights(config, family, layer, f"{prefix}.layers.{layer}")
    weights.append(_single("norm.weight", f"{prefix}.norm.weight", (config.hidden_size,)))
    if not config.tie_word_embeddings:
        weights.append(_single("head.weight", f"{config.weight_prefix}lm_head.weight", vocabulary))
    return WeightLayout(weights=tuple(weights))


def _layer_weights(config: ModelConfig, family: Family, layer: int, source: str) -> Iterator[Weight]:
    target = f"layers.{layer}"
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

    def norm(name: str, source_name: str | None, size: int = hidden) -> Iterator[Weight]:
        if source_name is not None:
            yield _single(f"{target}.{name}.weight", f"{source}.{source_name}.weight", (size,), layer)

    def linear(
        name: str, sources: Sequence[str], rows: Sequence[int], columns: int, has_bias: bool
    ) -> Iterator[Weight]:
        for kind, row_shape in (("weight", (columns,)), ("bias", ())) if has_bias else (("weight", (columns,)),):
            yield Weight(
                name=f"{target}.{name}.{kind}",
                shape=(sum(rows), *row_shape),
                sources=tuple(f"{source}.{part}.{kind}" for part in sources),
                source_shapes=tuple((num_rows, *row_shape) for num_rows in rows),
                layer=layer,
            )

    qkv = [f"self_attn.{part}_proj" for part in "qkv"]
    yield from norm("attention_norm", family.attention_norm)
    yield from linear("attention.qkv", qkv, [q_rows, kv_rows, kv_rows], hidden, config.attention_bias)
    yield from norm("attention.q_norm", "self_attn.q_norm" if config.qk_norm else None, head_dim)
    yield from norm("attention.k_norm", "self_attn.k_norm" if config.qk_norm else None, head_dim)
    yield from linear("attention.out", ["self_attn.o_proj"], [hidden], q_rows, config.attention_output_bias)
    yield from norm("attention_out_norm", family.attention_out_norm)
    yield from norm("mlp_norm", family.mlp_norm)
    experts, names = config.experts, family.experts
    if experts is not None and names is not None and experts.layers[layer]:
        count, expert_inner = experts.num_experts, experts.intermediate_size
        of_each = [f"{names.experts}.{expert}." for expert in range(count)]
        gate_up = [expert + part for expert in of_each for part in (names.gate, names.up)]
        yield from linear("mlp.router", [names.router], [count], hidden, False)
        yield from linear("mlp.experts.gate_up", gate_up, [expert_inner] * 2 * count, hidden, False)
        yield from linear("mlp.experts.down", [e + names.down for e in of_each], [hidden] * count, expert_inner, False)
    else:
        yield from linear("mlp.gate_up", ["mlp.gate_proj", "mlp.up_proj"], [inner, inner], hidden, config.mlp_bias)
        yield from linear("mlp.down", ["mlp.down_proj"], [hidden], inner, config.mlp_bias)
    yield from norm("mlp_out_norm", family.mlp_out_norm)


def _single(name: str, source: str, shape: tuple[int, ...], layer: int | None = None) -> Weight:
    return Weight(name=name, shape=shape, sources=(source,), source_shapes=(shape,), layer=layer)
