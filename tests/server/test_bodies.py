import msgspec
import pytest

from flashtensors.errors import RequestError, UnsupportedField
from flashtensors.server.bodies import parse_body
from flashtensors.server.openai.schema import (
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    ChatRequest,
    CompletionRequest,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse_chat(**fields: object) -> ChatRequest:
    return parse_body(msgspec.json.encode({**CHAT, **fields}), ChatRequest, UNSUPPORTED_IN_CHAT)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"null",
        b"NaN",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e309}',
        b'{"model": "m"} trailing',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff\xfe"}',
        b'{"model": "a\x00b"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(body, ChatRequest, UNSUPPORTED_IN_CHAT)


def test_an_unknown_field_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(RequestError, match=r"temprature.*temperature") as caught:
        parse_chat(temprature=1.0)
    assert caught.value.param == "temprature"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("store", True),
        ("tool_choice", "required"),
        ("store", 0),  # equal to False, and yet not what the field takes
    ],
)
def test_an_unsupported_field_is_named(name: str, value: object) -> None:
    with pytest.raises(UnsupportedField) as caught:
        parse_chat(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", []), ("tools", None), ("response_format", {"type": "text"}), ("user", "u"), ("metadata", {"a": "b"})],
)
def test_values_that_ask_for_nothing_are_accepted(name: str, value: object) -> None:
    assert parse_chat(**{name: value}).model == "m"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"n": True}, "n"),
        ({"stop": 3}, "stop"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[...].role"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream_options": {"foo": 1}}, "stream_options"),
    ],
)
def test_a_wrong_type_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(**fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param.split("[")[0])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ],
)
def test_a_value_out_of_range_is_named(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat(**fields).sampling_params()
    assert caught.value.param == param


def test_max_completion_tokens_wins_and_bias_keys_become_ids() -> None:
    sampling = parse_chat(max_tokens=3, max_completion_tokens=7, logit_bias={"12": -100}, top_k=-1).sampling_params()
    assert (sampling.max_tokens, sampling.logit_bias, sampling.top_k) == (7, {12: -100.0}, 0)


def test_messages_become_what_templates_expect() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = parse_chat(messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    assert body.template_messages() == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
    ],
)
def test_messages_that_need_more_than_text_are_refused(message: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        parse_chat(messages=[message]).template_messages()


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "self"])
def test_template_variables_cannot_replace_the_conversation(name: str) -> None:
    with pytest.raises(RequestError):
        parse_chat(chat_template_kwargs={name: 1}).template_variables()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_come_in_four_shapes(prompt: object, expected: object) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})
    assert parse_body(body, CompletionRequest, UNSUPPORTED_IN_COMPLETIONS).prompts() == expected


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], 2], [["a"]], {}, 5])
def test_other_prompts_are_refused(prompt: object) -> None:
    body = msgspec.json.encode({"model": "m", "prompt": prompt})
    with pytest.raises(RequestError):
        parse_body(body, CompletionRequest, UNSUPPORTED_IN_COMPLETIONS).prompts()
