"""What the door of the room promises: layouts, ownership of weights, and a typed refusal."""

from __future__ import annotations

import msgspec
import pytest
import torch

from flashtensors.checkpoint.architecture import SUPPORTED_MODEL_TYPES, ModelConfig
from flashtensors.errors import UnsupportedModel
from flashtensors.models.registry import FAMILIES, build_model, weight_layout

TINY = ModelConfig(
    model_type="llama",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=32,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
)


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {weight.name: torch.randn(weight.shape) for weight in weight_layout(config).weights}


def test_every_supported_model_type_has_a_family() -> None:
    assert set(FAMILIES) == set(SUPPORTED_MODEL_TYPES)


def test_an_unknown_model_type_is_refused_by_name() -> None:
    config = msgspec.structs.replace(TINY, model_type="mamba")
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama"):
        weight_layout(config)
    with pytest.raises(UnsupportedModel, match=r"'mamba'.*llama"):
        build_model(config, {}, dtype=torch.float32)


def test_the_layout_fuses_rows_in_execution_order() -> None:
    weights = {weight.name: weight for weight in weight_layout(TINY).weights}
    assert list(weights)[:3] == ["embedding.weight", "layers.0.attention_norm.weight", "layers.0.attention.qkv.weight"]
    assert list(weights)[-2:] == ["norm.weight", "head.weight"]
    layers = [weight.layer for weight in weights.values() if weight.layer is not None]
    assert layers == sorted(layers)
    qkv = weights["layers.1.attention.qkv.weight"]
    assert qkv.shape == (32, 16)
    assert qkv.sources == tuple(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    assert qkv.source_shapes == ((16, 16), (8, 16), (8, 16))
    assert weights["layers.0.mlp.gate_up.weight"].sources == (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    )


def test_a_tied_head_is_not_listed() -> None:
    tied = weight_layout(msgspec.structs.replace(TINY, tie_word_embeddings=True))
    assert {weight.name for weight in weight_layout(TINY).weights} - {weight.name for weight in tied.weights} == {
        "head.weight"
    }


def test_a_text_model_inside_another_has_a_prefix() -> None:
    layout = weight_layout(msgspec.structs.replace(TINY, weight_prefix="language_model."))
    sources = [source for weight in layout.weights for source in weight.sources]
    assert all(source.startswith(("language_model.model.", "language_model.lm_head.")) for source in sources)


@pytest.mark.parametrize("fault", ["shape", "dtype", "missing"])
def test_weights_that_do_not_fit_the_layout_are_our_own_fault(fault: str) -> None:
    weights = random_weights(TINY)
    name = "layers.1.mlp.down.weight"
    weights[name] = weights[name].T.contiguous() if fault == "shape" else weights[name].half()
    if fault == "missing":
        del weights[name]
    with pytest.raises((AssertionError, KeyError), match=name):
        build_model(TINY, weights, dtype=torch.float32)


def test_building_changes_no_weight() -> None:
    weights = random_weights(TINY)
    before = {name: weight.clone() for name, weight in weights.items()}
    build_model(TINY, weights, dtype=torch.float32)
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.gpu
def test_on_a_gpu_building_allocates_next_to_nothing() -> None:
    config = msgspec.structs.replace(TINY, hidden_size=512, intermediate_size=2048, vocab_size=4096)
    weights = {name: weight.cuda() for name, weight in random_weights(config).items()}
    before = torch.cuda.memory_allocated()
    model = build_model(config, weights, dtype=torch.float32)
    assert torch.cuda.memory_allocated() - before < 4096
    assert model is not None
