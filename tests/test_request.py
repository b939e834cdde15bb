"""Sampling parameters check themselves and say which field is wrong."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from flashtensors.errors import RequestError
from flashtensors.request import EngineRequest, SamplingParams, SequenceDelta, TokenLogprobs

_BAD = [
    ("n", 0),
    ("n", 129),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("top_k", -1),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 100.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", math.nan),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {5: 100.1}),
    ("logit_bias", {5: math.nan}),
    ("logprobs", -1),
    ("logprobs", 21),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("stop", ["a", ""]),
    ("stop", ["a"] * 17),
    ("max_tokens", 0),
    ("max_tokens", 2**64),
    ("min_tokens", 2**64),
    ("top_k", 2**64),
    ("min_tokens", -1),
    ("min_tokens", 17),
]

_GOOD = [
    {},
    {"n": 128, "temperature": 0.0, "top_p": 0.001, "min_p": 1.0, "logprobs": 20},
    {"temperature": 100.0, "top_p": 1.0, "top_k": 10**9, "repetition_penalty": 100.0},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0, "logit_bias": {0: -100.0, 7: 100.0}, "logprobs": 0},
    {"seed": -(2**63), "stop": ["x"] * 16, "max_tokens": None, "min_tokens": 0},
    {"seed": 2**63 - 1, "max_tokens": 4, "min_tokens": 4, "stop_token_ids": [1, 2], "ignore_eos": True},
]


@pytest.mark.parametrize(("field", "value"), _BAD)
def test_value_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{field} is .*but it must be ") as failure:
        SamplingParams(**{field: value})  # pyright: ignore[reportArgumentType]
    assert failure.value.param == field
    assert failure.value.http_status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2.0),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", None),
        ("top_k", 2.5),
        ("seed", 1.5),
        ("logit_bias", {"a": 1.0}),
        ("logprobs", 1.5),
        ("logprobs", True),
        ("stop", [3]),
        ("stop", b"END"),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 5),
        ("ignore_eos", 1),
        ("max_tokens", 2.5),
        ("max_tokens", "3"),
        ("min_tokens", None),
    ],
)
def test_value_of_another_type_names_its_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{field} is .*but it must be of type ") as failure:
        SamplingParams(**{field: value})  # pyright: ignore[reportArgumentType]
    assert failure.value.param == field


def test_numbers_of_numpy_become_those_of_python() -> None:
    params = SamplingParams(seed=np.int64(5), temperature=np.float32(0.5), top_p=np.float64(0.5))  # pyright: ignore
    assert [type(each) for each in (params.seed, params.temperature, params.top_p)] == [int, float, float]
    assert (params.seed, params.temperature, params.top_p) == (5, 0.5, 0.5)


def test_one_stop_string_needs_no_list() -> None:
    assert SamplingParams(stop="END").stop == ["END"]
    with pytest.raises(RequestError, match="non-empty"):
        SamplingParams(stop="")


@pytest.mark.parametrize("fields", _GOOD)
def test_limits_themselves_are_allowed(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields


def test_defaults_are_those_of_the_openai_completions_api() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.max_tokens) == (1, 1.0, 1.0, 16)
    assert (params.presence_penalty, params.frequency_penalty, params.logprobs) == (0.0, 0.0, None)


def test_min_tokens_without_a_maximum_has_no_upper_limit() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


def test_parameters_cannot_change_and_do_not_share_lists() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.n = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert SamplingParams().stop is not SamplingParams().stop
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop[0] = ""
    assert params.stop == ["a"]


def test_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(msgspec.ValidationError, match="best_of"):
        msgspec.convert({"best_of": 3}, SamplingParams)


def test_requests_and_answers_survive_the_wire() -> None:
    sampling = SamplingParams(temperature=0.0, logit_bias={3: -1.5}, stop=["\n"], seed=7)
    request = EngineRequest(request_id="r", model="m", prompt_token_ids=[1, 2], sampling=sampling, priority=1)
    delta = SequenceDelta(
        request_id="r",
        index=1,
        token_ids=[5],
        logprobs=[TokenLogprobs(logprob=-0.5, top=[(5, -0.5), (6, -1.25)])],
        finish_reason="stop",
        stop_token_id=5,
    )
    for value in (request, delta):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value
