"""Which quantisations of a config.json are read, and how others are refused."""

from __future__ import annotations

from typing import Any

import pytest

from flashtensors.checkpoint.architecture import parse_config
from flashtensors.checkpoint.config_fp8 import Fp8Config, fp8_config
from flashtensors.errors import CheckpointError, UnsupportedModel
from flashtensors.testing.checkpoints import tiny_config

FINEGRAINED: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
FBGEMM: dict[str, Any] = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def compressed(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What llm-compressor writes, with changes to the scheme of weights and to the rest."""
    scheme: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": scheme | (weights or {}), "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"], **changes}


def parse(quantization: dict[str, Any], model_type: str = "llama") -> Fp8Config:
    config = parse_config(tiny_config(model_type, quantization_config=quantization), None, where="config.json")
    assert config.quantization is not None
    return config.quantization


@pytest.mark.parametrize(
    ("quantization", "is_blockwise", "scale_name"),
    [
        (FINEGRAINED, True, "weight_scale_inv"),
        (FBGEMM, False, "weight_scale"),
        (compressed(), False, "weight_scale"),
        (compressed({"strategy": "block", "block_structure": [128, 128]}), True, "weight_scale"),
        (fp8_config(), False, "weight_scale"),
    ],
)
def test_schemes_that_are_read(quantization: dict[str, Any], is_blockwise: bool, scale_name: str) -> None:
    parsed = parse(quantization)
    assert (parsed.is_blockwise, parsed.scale_name) == (is_blockwise, scale_name)
    assert parsed.covers("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("kept", "kept_modules"),
    [
        (["lm_head"], {"lm_head"}),
        (["model.layers.1"], {"model.layers.1.mlp.up_proj", "model.layers.1.self_attn.o_proj"}),
        (["up_proj"], {"model.layers.1.mlp.up_proj"}),
        (["re:.*self_attn.*"], {"model.layers.1.self_attn.o_proj"}),
        ([r"re:^.*\.mlp\.up_proj$", "re:lm_head"], {"model.layers.1.mlp.up_proj", "lm_head"}),
        (["model.layers.[1]", "*"], set()),
    ],
)
def test_modules_that_are_kept_are_named_in_any_way(kept: list[str], kept_modules: set[str]) -> None:
    modules = {
        "lm_head",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.10.mlp.down_proj",
    }
    for quantization in ({**FBGEMM, "modules_to_not_convert": kept}, compressed(ignore=kept)):
        parsed = parse(quantization)
        assert {module for module in modules if not parsed.covers(module)} == kept_modules


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({**FINEGRAINED, "weight_block_size": None}, "weight_block_size is None"),
        ({**FINEGRAINED, "weight_block_size": [64, 128]}, "weight_block_size"),
        ({**FINEGRAINED, "activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({**FINEGRAINED, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        (compressed({"strategy": "tensor"}), "strategy of weights is 'tensor'"),
        (compressed({"type": "int"}), "not 8-bit floats"),
        (compressed({"num_bits": 4}), "not 8-bit floats"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(config_groups={}), "config_groups"),
        (compressed(ignore=["re:(a+)+$"]), "letters, dots"),
    ],
)
def test_other_schemes_are_refused_by_name(quantization: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModel, match="what does is fp8") as caught:
        parse(quantization)
    assert says in caught.value.message


def test_static_scales_of_activations_are_refused() -> None:
    quantization = compressed()
    quantization["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    with pytest.raises(UnsupportedModel, match="input_activations are not dynamic"):
        parse(quantization)


def test_experts_in_fp8_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="experts in fp8"):
        parse(FINEGRAINED, "qwen3_moe")


def test_names_must_be_names() -> None:
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        parse({**FBGEMM, "modules_to_not_convert": [3]})
