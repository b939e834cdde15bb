"""The weights of a decoder: the names it computes with, and the checkpoint tensors that make them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..checkpoint.architecture import ModelConfig
from ..checkpoint.config_fp8 import FP8_BLOCK
from ..checkpoint.layout import Weight, WeightLayout
from ..errors import UnsupportedModel
from .family import Family


def decoder_layout(config: ModelConfig, family: Family) -> WeightLayout:
    """All weights in execution order; q, k, v and gate, up are fused by rows.

    All experts of a layer are two weights: gate 0, up 0, gate 1, up 1 …, and down 0, down 1 …, by rows. A weight in fp8
    has a `scale` beside it: `[rows, 1]`, or `[row blocks, column blocks]`.

    Raises:
        UnsupportedModel: Projections that are one product here are quantised in ways that do not go together.
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
        modules = [f"{source}.{part}" for part in sources]
        is_fp8 = _is_fp8(config, modules)
        yield _fused(f"{target}.{name}.weight", modules, "weight", rows, (columns,), layer, _FP8 if is_fp8 else None)
        if is_fp8:
            yield _scale(config, f"{target}.{name}.scale", modules, rows, columns, layer)
        if has_bias:
            yield _fused(f"{target}.{name}.bias", modules, "bias", rows, (), layer)

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


_FP8 = "float8_e4m3fn"


def _is_fp8(config: ModelConfig, modules: Sequence[str]) -> bool:
    """Whether projections that are multiplied together are stored in fp8."""
    quantization = config.quantization
    are_fp8 = {quantization is not None and quantization.covers(module) for module in modules}
    if len(are_fp8) > 1:
        raise UnsupportedModel(
            f"of {', '.join(modules)} some are quantised and some are not, but they are one product here; pull the "
            "unquantised model"
        )
    return are_fp8.pop()


def _scale(
    config: ModelConfig, name: str, modules: Sequence[str], rows: Sequence[int], columns: int, layer: int
) -> Weight:
    """Scales of a weight in fp8, one for each row or for each block."""
    assert config.quantization is not None, "a scale of a model that is not quantised"
    kind = config.quantization.scale_name
    if not config.quantization.is_blockwise:
        return _fused(name, modules, kind, rows, (1,), layer, "float32")
    if len(rows) > 1 and any(num_rows % FP8_BLOCK for num_rows in rows):
        raise UnsupportedModel(
            f"{', '.join(modules)} have {', '.join(map(str, rows))} rows with a scale for each {FP8_BLOCK} x "
            f"{FP8_BLOCK} block, but as one product here each needs a multiple of {FP8_BLOCK}; pull the unquantised "
            "model, and quantise it as you pull it"
        )
    row_blocks = [-(-num_rows // FP8_BLOCK) for num_rows in rows]
    return _fused(name, modules, kind, row_blocks, (-(-columns // FP8_BLOCK),), layer, "float32")


def _fused(
    name: str,
    modules: Sequence[str],
    kind: str,
    rows: Sequence[int],
    row_shape: tuple[int, ...],
    layer: int,
    dtype: str | None = None,
) -> Weight:
    """The rows of several modules' tensors of one kind."""
    return Weight(
        name=name,
        shape=(sum(rows), *row_shape),
        sources=tuple(f"{module}.{kind}" for module in modules),
        source_shapes=tuple((num_rows, *row_shape) for num_rows in rows),
        dtype=dtype,
        layer=layer,
    )


def _single(name: str, source: str, shape: tuple[int, ...], layer: int | None = None) -> Weight:
    return Weight(name=name, shape=shape, sources=(source,), source_shapes=(shape,), layer=layer)
