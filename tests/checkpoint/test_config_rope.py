"""YaRN in configurations, as transformers reads it; the context that follows; and values that cannot be meant."""

import json
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3Config

from flashtensors.checkpoint.architecture import parse_config
from flashtensors.checkpoint.config_rope import RopeScaling
from flashtensors.errors import CheckpointError
from flashtensors.testing.checkpoints import tiny_config

ORIGINAL = "original_max_position_embeddings"
QWEN_CARD = {"factor": 4.0, ORIGINAL: 32768}
CLASSES: dict[str, Any] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}


def parse_yarn(*, model_type: str = "qwen3", stated: int = 32768, key: str = "rope_scaling", **rope: object) -> Any:
    config = tiny_config(model_type, max_position_embeddings=stated, rope_theta=1_000_000.0)
    return parse_config({**config, key: {"rope_type": "yarn", **rope}}, None, where="here/config.json")


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize(
    "rope",
    [
        QWEN_CARD,
        {"factor": 4},
        {**QWEN_CARD, "beta_fast": 16, "beta_slow": 2.5, "truncate": False},
        {**QWEN_CARD, "attention_factor": 1.25, "beta_fast": None, "truncate": None},
        {**QWEN_CARD, "mscale": 1.0, "mscale_all_dim": 0.707},
        {**QWEN_CARD, "mscale": 1.0, "mscale_all_dim": 0},
    ],
)
def test_yarn_is_read_in_both_spellings_as_transformers_reads_it(model_type: str, rope: dict[str, Any]) -> None:
    keys = {**tiny_config(model_type, max_position_embeddings=40960), "rope_theta": 1_000_000.0}
    old = {**keys, "rope_scaling": {"type": "yarn", **rope}}
    reference = CLASSES[model_type](**json.loads(json.dumps(old)))
    parsed, again = parse_config(old, None, where="old"), parse_config(reference.to_dict(), None, where="new")
    assert parsed.rope_scaling == again.rope_scaling
    assert parsed.rope_theta == again.rope_theta == reference.rope_parameters["rope_theta"] == 1_000_000.0
    expected = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}
    expected |= {key: value for key, value in reference.rope_parameters.items() if value is not None}
    scaling = parsed.rope_scaling
    assert isinstance(scaling, RopeScaling)
    for key in ("rope_type", "factor", ORIGINAL, *expected.keys() - {"type", "rope_theta"}):
        assert (getattr(scaling, key) or None) == (expected[key] or None), key


@pytest.mark.parametrize(
    ("stated", "rope", "context"),
    [
        (32768, QWEN_CARD, 131072),
        (40960, QWEN_CARD, 131072),  # as Qwen3 states it: room for a prompt of 32768 and its answer
        (131072, QWEN_CARD, 131072),
        (262144, QWEN_CARD, 262144),
        (1000, {"factor": 2.5}, 2500),
        (40960, {"factor": 1.0, ORIGINAL: 32768}, 40960),
    ],
)
def test_the_context_is_the_stretched_one(stated: int, rope: dict[str, Any], context: int) -> None:
    assert parse_yarn(stated=stated, **rope).max_position_embeddings == context


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
def test_other_scalings_leave_the_context_as_it_is_stated(rope_type: str) -> None:
    rope = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
    assert parse_yarn(stated=131072, **{**rope, "rope_type": rope_type}).max_position_embeddings == 131072


def test_an_original_context_beside_the_rope_parameters_wins() -> None:
    config = tiny_config("llama", max_position_embeddings=512, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert parse_config({**config, ORIGINAL: 256}, None, where="x").max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", None),
        ("factor", "4"),
        ("factor", 0.5),
        ("factor", -4.0),
        ("factor", float("nan")),
        ("factor", 1e9),
        (ORIGINAL, 0),
        (ORIGINAL, 32768.0),
        (ORIGINAL, "32768"),
        (ORIGINAL, 2**40),
        ("beta_fast", 0.5),
        ("beta_fast", "fast"),
        ("beta_slow", 0),
        ("beta_slow", 64.0),
        ("truncate", "no"),
        ("truncate", 0),
        ("attention_factor", 0),
        ("attention_factor", True),
        ("attention_factor", float("inf")),
        ("mscale", -1.0),
        ("mscale_all_dim", [1.0]),
        ("rope_theta", 1.0),
    ],
)
def test_yarn_values_of_the_wrong_type_or_range_are_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_yarn(**{**QWEN_CARD, key: value})
    assert caught.value.message.startswith("here/config.json: rope_scaling: ")
    assert key in caught.value.message


def test_a_factor_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match="factor is None, but it must be a number"):
        parse_yarn(original_max_position_embeddings=32768)
