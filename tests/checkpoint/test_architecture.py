"""Configurations are read as transformers' own classes read them; what does not run is refused by name."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from flashtensors.checkpoint.architecture import ModelConfig, parse_config, read_model_config
from flashtensors.checkpoint.config_experts import ExpertsConfig
from flashtensors.errors import CheckpointError, UnsupportedModel
from flashtensors.testing.checkpoints import iter_tiny_configs, tiny_config

CLASSES: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3_text": Gemma3TextConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def some_of(choose: random.Random, **options: list[Any]) -> dict[str, Any]:
    """Some of the keys, each with one of its values."""
    return {key: choose.choice(values) for key, values in options.items() if choose.random() < 0.6}


def random_keys(model_type: str, choose: random.Random) -> dict[str, Any]:
    """Keys of a `config.json` in the spelling of transformers 4, many left out."""
    num_heads = choose.choice([4, 8])
    keys = {"num_attention_heads": num_heads, "hidden_size": num_heads * choose.choice([8, 16])}
    keys |= some_of(
        choose,
        num_key_value_heads=[1, 2, 4],
        num_hidden_layers=[1, 5, 13],
        intermediate_size=[96, 160],
        vocab_size=[300, 512],
        max_position_embeddings=[256, 4096],
        rms_norm_eps=[1e-5, 1e-6],
        tie_word_embeddings=[True, False],
        rope_theta=[10_000.0, 500_000, 1_000_000.0],
        bos_token_id=[0, 1, None],
        eos_token_id=[2, [2, 5], None],
        torch_dtype=["float32", "bfloat16", "float16"],
    )
    if "num_key_value_heads" not in keys and model_type != "llama":
        keys["num_key_value_heads"] = 4
    if model_type != "qwen2":
        keys |= some_of(choose, head_dim=[16, 24])
    if model_type == "llama":
        keys |= some_of(choose, attention_bias=[True, False], mlp_bias=[True, False], head_dim=[None])
        keys |= some_of(choose, rope_scaling=[None, {"type": "linear", "factor": 2.0}, LLAMA3_ROPE])
    elif model_type in ("mistral", "mixtral"):
        keys |= some_of(choose, sliding_window=[None, 64])
        if model_type == "mixtral":
            keys |= some_of(choose, num_local_experts=[4, 6], num_experts_per_tok=[1, 3])
    elif model_type == "qwen3_moe":
        keys |= some_of(choose, use_sliding_window=[True, False], sliding_window=[32], num_experts=[16, 9])
        keys |= some_of(choose, num_experts_per_tok=[2, 4], moe_intermediate_size=[48], norm_topk_prob=[True, False])
        keys |= some_of(choose, decoder_sparse_step=[1, 2, 3], mlp_only_layers=[[], [0, 4]], attention_bias=[True])
    elif model_type in ("qwen2", "qwen3"):
        window = {"use_sliding_window": [True, False], "max_window_layers": [0, 2, 28], "sliding_window": [32]}
        keys |= some_of(choose, **window, rope_scaling=[None, {"rope_type": "linear", "factor": 4}])
    else:
        keys |= some_of(choose, sliding_window=[32], sliding_window_pattern=[2, 6], query_pre_attn_scalar=[24, 256])
        keys |= some_of(choose, final_logit_softcapping=[None, 30.0], attn_logit_softcapping=[None, 50.0])
        keys |= some_of(choose, rope_scaling=[{"rope_type": "linear", "factor": 8.0}], rope_local_base_freq=[5000.0])
    return keys


def assert_same(parsed: ModelConfig, reference: Any) -> None:
    """Every field of `parsed` against the attributes of a transformers configuration."""
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "model_type"),
    ):
        assert getattr(parsed, name) == getattr(reference, name), name
    num_heads = reference.num_attention_heads
    assert parsed.head_dim == (getattr(reference, "head_dim", None) or reference.hidden_size // num_heads)
    is_gemma = reference.model_type == "gemma3_text"
    rope = reference.rope_parameters["full_attention"] if is_gemma else reference.rope_parameters
    assert parsed.rope_theta == rope["rope_theta"]
    scaling = {"rope_type": "default"} if parsed.rope_scaling is None else to_dict(parsed.rope_scaling)
    assert {key: rope[key] for key in rope if key in scaling} == {key: scaling[key] for key in scaling if key in rope}
    assert scaling["rope_type"] == rope["rope_type"]
    types = getattr(reference, "layer_types", None) or ["full_attention"] * reference.num_hidden_layers
    if reference.model_type in ("mistral", "mixtral", "qwen3_moe") and reference.sliding_window is not None:
        types = ["sliding_attention"] * reference.num_hidden_layers
    slides = [layer_type == "sliding_attention" for layer_type in types]
    assert list(parsed.sliding_layers or [False] * len(slides)) == slides
    assert parsed.sliding_window == (reference.sliding_window if any(slides) else None)
    eos = reference.eos_token_id
    assert parsed.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert parsed.bos_token_id == reference.bos_token_id
    assert parsed.dtype == str(reference.dtype or "bfloat16").removeprefix("torch.")
    assert parsed.attention_bias == (reference.model_type == "qwen2" or getattr(reference, "attention_bias", False))
    assert parsed.mlp_bias == getattr(reference, "mlp_bias", False)
    assert parsed.hidden_act == (reference.hidden_activation if is_gemma else reference.hidden_act)
    assert_same_experts(parsed.experts, reference)
    if is_gemma:
        assert parsed.rope_local_theta == reference.rope_parameters["sliding_attention"]["rope_theta"]
        assert parsed.query_scale == reference.query_pre_attn_scalar**-0.5
        assert parsed.final_logit_softcap == reference.final_logit_softcapping
        assert parsed.attention_logit_softcap == reference.attn_logit_softcapping
        assert parsed.embedding_scale == reference.hidden_size**0.5


def assert_same_experts(parsed: ExpertsConfig | None, reference: Any) -> None:
    if reference.model_type not in ("mixtral", "qwen3_moe"):
        assert parsed is None
        return
    assert parsed is not None
    is_mixtral, layers = reference.model_type == "mixtral", range(reference.num_hidden_layers)
    assert (parsed.num_experts, parsed.num_experts_per_tok) == (reference.num_experts, reference.num_experts_per_tok)
    if is_mixtral:
        assert (parsed.intermediate_size, parsed.norm_topk_prob) == (reference.intermediate_size, True)
        assert all(parsed.layers)
    else:
        assert parsed.intermediate_size == reference.moe_intermediate_size
        assert parsed.norm_topk_prob == reference.norm_topk_prob
        plain, step = reference.mlp_only_layers, reference.decoder_sparse_step
        assert list(parsed.layers) == [layer not in plain and (layer + 1) % step == 0 for layer in layers]
    assert len(parsed.layers) == len(layers)


def to_dict(scaling: Any) -> dict[str, object]:
    return {name: getattr(scaling, name) for name in scaling.__struct_fields__}


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("seed", range(12))
def test_random_configurations_in_both_spellings(model_type: str, seed: int) -> None:
    keys = random_keys(model_type, random.Random(seed))
    reference = CLASSES[model_type](**json.loads(json.dumps(keys)))
    assert_same(parse_config({"model_type": model_type, **keys}, None, where="old"), reference)
    assert_same(parse_config(json.loads(json.dumps(reference.to_dict(), default=str)), None, where="new"), reference)


@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_keys_mean_what_the_class_says(model_type: str) -> None:
    assert_same(parse_config({"model_type": model_type}, None, where="empty"), CLASSES[model_type]())


def test_gemma3_is_read_as_its_text_part() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16", "eos_token_id": [1, 106]}
    parsed = parse_config(config, None, where="gemma-3-4b")
    assert parsed.model_type == "gemma3_text"
    assert parsed.weight_prefix == "language_model."
    assert parsed.eos_token_ids == (1, 106)
    assert parsed.tie_word_embeddings
    assert parsed.rope_scaling is not None
    assert parsed.rope_scaling.factor == 8.0
    assert parsed.sliding_layers == tuple((layer + 1) % 6 != 0 for layer in range(34))


def test_generation_config_wins_for_token_ids_and_ids_beyond_the_vocabulary_are_left_out() -> None:
    config = tiny_config("qwen3", eos_token_id=3)
    parsed = parse_config(config, {"eos_token_id": [5, 6, 304], "bos_token_id": 7}, where="x")
    assert (parsed.bos_token_id, parsed.eos_token_ids) == (7, (5, 6))
    assert parse_config(config, {"temperature": 0.6}, where="x").eos_token_ids == (3,)


def test_code_of_the_repository_is_ignored() -> None:
    config = tiny_config("llama", auto_map={"AutoConfig": "boom.Boom"}, trust_remote_code=True)
    assert parse_config(config, None, where="x") == parse_config(tiny_config("llama"), None, where="x")


def llama(**changes: object) -> dict[str, object]:
    return tiny_config("llama", **changes)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "model_type None is not supported; supported are llama, mistral, qwen2, qwen3, gemma3_text"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        (llama(quantization_config={"quant_method": "gptq"}), "quantised with 'gptq'"),
        (llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0}), "rope_type 'dynamic'"),
        (llama(rope_scaling={"type": "longrope"}), "rope_type 'longrope'"),
        (llama(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (llama(rope_parameters={"full_attention": {"rope_theta": 1.0}}), "by layer type"),
        (llama(hidden_act="relu"), "hidden_act 'relu'"),
        (tiny_config("mixtral", hidden_act="gelu_pytorch_tanh"), "'gelu_pytorch_tanh' is not supported in experts"),
        (llama(dtype="float8_e4m3fn"), "dtype 'float8_e4m3fn'"),
        (tiny_config("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (tiny_config("qwen3", layer_types=["full_attention", "linear_attention"]), "'linear_attention'"),
        (
            tiny_config("gemma3_text", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2}}),
            "sliding_attention layers is scaled",
        ),
    ],
)
def test_what_does_not_run_is_refused_by_name(config: dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        parse_config(config, None, where="here/config.json")
    assert says in caught.value.message
    assert caught.value.message.startswith("here/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": "64"},
        {"hidden_size": 64.0},
        {"hidden_size": True},
        {"hidden_size": None},
        {"hidden_size": 2**31},
        {"hidden_size": 66},
        {"num_hidden_layers": 10**18},
        {"num_key_value_heads": 3},
        {"num_attention_heads": [4]},
        {"head_dim": 15},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": {"rope_theta": -1.0}},
        {"rope_parameters": {"rope_theta": 10**400}},
        {"rope_parameters": 1},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [-1]},
        {"eos_token_id": [2, None]},
        {"dtype": 16},
        {"hidden_act": 1},
    ],
)
def test_values_of_the_wrong_type_or_range_are_named(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(llama(**changes), None, where="here/config.json")
    assert any(key in caught.value.message for key in [*changes, "rope_theta", "factor"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window"),
    ],
)
def test_contradictions_of_sliding_windows_are_named(changes: dict[str, object], key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(tiny_config("qwen3", **changes), None, where="x")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_experts_out_of_range_are_named(changes: dict[str, object], key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        parse_config(tiny_config("qwen3_moe", **changes), None, where="x")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"a": NaN}', b"\xff", b'{"a":' * 100_000, b" " * (16 * 1024**2 + 1)]
)
def test_a_file_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        read_model_config(tmp_path)
    for config in iter_tiny_configs():
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
        assert read_model_config(tmp_path) == parse_config(config, {"eos_token_id": 9}, where="x")
