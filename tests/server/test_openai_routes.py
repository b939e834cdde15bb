"""The OpenAI routes, driven by the official client, in front of a scripted worker."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from .conftest import ANSWER, FakeDaemon, StartDaemon
from .fake_worker import FakeScript

QUESTION = [{"role": "user", "content": "What?"}]


@pytest.fixture
def daemon(clean_daemon: FakeDaemon) -> FakeDaemon:
    return clean_daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client


def events_of(response: httpx.Response) -> list[dict[str, object] | str]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="tiny", messages=QUESTION)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "tiny"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens > 5
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 3


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == ANSWER
    assert not any("\ufffd" in text for text in texts)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("form", [lambda own: own, dict, lambda own: own.model_dump(), lambda own: own.to_dict()])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_in_any_of_the_clients_forms_is_history(
    client: openai.OpenAI, form: Callable[[Any], Any], is_streamed: bool
) -> None:
    if is_streamed:
        with client.chat.completions.stream(model="tiny", messages=QUESTION) as stream:
            own = stream.get_final_completion().choices[0].message
    else:
        own = client.chat.completions.create(model="tiny", messages=QUESTION).choices[0].message
    plain = {"role": "assistant", "content": own.content}
    usages = [
        client.chat.completions.create(model="tiny", messages=[*QUESTION, message, *QUESTION]).usage
        for message in (plain, form(own))
    ]
    assert usages[0] == usages[1], "the template sees the same"


def test_a_stream_ends_with_done_and_is_not_buffered_by_proxies(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, "stream": True})
    assert events_of(response)[-1] == "[DONE]"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["content-type"].startswith("text/event-stream")


def test_n_answers_come_apart(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="tiny", messages=QUESTION, n=3, max_tokens=4)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in completion.choices} == {"length"}
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 12
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 3


def test_a_stop_string_cuts_the_text_and_stops_the_worker(daemon: FakeDaemon, client: openai.OpenAI) -> None:
    daemon.script.token_delay_s = 0.001
    completion = client.chat.completions.create(model="tiny", messages=QUESTION, stop=["two", "nothing"])
    assert completion.choices[0].message.content == "Hello world! One "
    assert completion.choices[0].finish_reason == "stop"
    assert any(getattr(command, "finish_reason", "") == "stop" for command in daemon.link.commands)


def test_text_held_back_for_a_stop_string_comes_when_it_does_not(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="tiny", messages=QUESTION, stop="text. And more")
    assert completion.choices[0].message.content == ANSWER


def test_a_stop_token_of_the_caller_is_not_part_of_the_text(daemon: FakeDaemon, client: openai.OpenAI) -> None:
    stop_id = daemon.script.answer[3]
    completion = client.completions.create(
        model="tiny", prompt="x", max_tokens=20, logprobs=0, extra_body={"stop_token_ids": [stop_id]}
    )
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].logprobs is not None
    assert completion.choices[0].logprobs.tokens is not None
    first = daemon.script.answer.index(stop_id)
    assert completion.choices[0].text == "".join(completion.choices[0].logprobs.tokens[:first])


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    arguments = {"model": "tiny", "messages": QUESTION, "logprobs": True, "top_logprobs": 2, "max_tokens": 5}
    if stream:
        chunks = client.chat.completions.create(**arguments, stream=True)
        found = [
            entry
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs and choice.logprobs.content
            for entry in choice.logprobs.content
        ]
    else:
        logprobs = client.chat.completions.create(**arguments).choices[0].logprobs
        assert logprobs is not None
        found = logprobs.content or []
    assert len(found) == 5
    assert found[0].logprob == -0.25
    assert found[0].bytes == list(found[0].token.encode())
    assert [len(entry.top_logprobs) for entry in found] == [2] * 5


def test_completion_logprobs_have_offsets_into_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="x", max_tokens=8, logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    assert choice.logprobs.top_logprobs is not None
    assert len(choice.logprobs.top_logprobs[0]) == 2


@pytest.mark.parametrize("prompt", ["a b", ["a", "b"], [5, 6, 7], [[5], [6, 7]]])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_shape(client: openai.OpenAI, prompt: object, stream: bool) -> None:
    num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    texts = {index: "" for index in range(2 * num_prompts)}
    arguments = {"model": "tiny", "prompt": prompt, "n": 2, "max_tokens": 200}
    if stream:
        for chunk in client.completions.create(**arguments, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        completion = client.completions.create(**arguments)
        texts = {choice.index: choice.text for choice in completion.choices}
    assert texts == dict.fromkeys(range(2 * num_prompts), ANSWER)


def test_completions_are_16_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt="x")
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


def test_models_are_listed_with_their_state(client: openai.OpenAI) -> None:
    states = {model.id: model.model_extra["flashtensors"]["state"] for model in client.models.list()}
    assert states == {"tiny": "on_disk", "plain": "on_disk"}
    client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert client.models.retrieve("tiny").model_extra["flashtensors"]["state"] == "ready"


@pytest.mark.parametrize(
    ("error_class", "code", "arguments"),
    [
        (openai.NotFoundError, "model_not_found", {"model": "tinny"}),
        (openai.BadRequestError, "unsupported_field", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        (openai.BadRequestError, "invalid_request", {"temperature": 1000}),
        (openai.BadRequestError, "invalid_request", {"logit_bias": {"304": 1}}),
        (openai.BadRequestError, "invalid_request", {"extra_body": {"stop_token_ids": [-1]}}),
        (openai.BadRequestError, "context_length_exceeded", {"messages": [{"role": "user", "content": "a " * 2000}]}),
        (openai.BadRequestError, "invalid_chat_template", {"model": "plain"}),
        (openai.BadRequestError, "invalid_config", {"extra_body": {"keep_alive": "soon"}}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_a_status_and_openais_body(
    client: openai.OpenAI, error_class: type[openai.APIStatusError], code: str, arguments: dict, stream: bool
) -> None:
    with pytest.raises(error_class) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "stream": stream, **arguments})
    assert caught.value.code == code
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "arguments",
    [{"prompt": [304]}, {"prompt": [-1]}, {"prompt": ""}, {"prompt": [[]]}, {"suffix": "x"}, {"echo": True},
     {"best_of": 3}, {"prompt": ["x"] * 1025}],
)  # fmt: skip
def test_bad_completions_are_refused(client: openai.OpenAI, arguments: dict) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**{"model": "tiny", "prompt": "x", **arguments})


def test_a_best_of_that_keeps_all_asks_for_nothing(client: openai.OpenAI) -> None:
    for arguments in ({"best_of": 1}, {"n": 3, "best_of": 3}, {"n": 2, "best_of": None}):
        answers = client.completions.create(**{"model": "tiny", "prompt": "x", **arguments}).choices
        assert len(answers) == arguments.get("n", 1)
    with pytest.raises(openai.BadRequestError, match="best_of") as caught:
        client.completions.create(model="tiny", prompt="x", n=2, best_of=3)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "best_of")


def test_a_missing_model_names_near_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="tinny", prompt="x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_503_with_retry_after(daemon: FakeDaemon, script: FakeScript, stream: bool) -> None:
    script.refuses_requests = True
    with daemon.client() as http:
        response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, "stream": stream})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "over_capacity"


def test_the_clients_own_retries_ride_out_a_full_queue(
    daemon: FakeDaemon, script: FakeScript, client: openai.OpenAI
) -> None:
    script.refuses_requests = True
    daemon.loop.call_soon_threadsafe(daemon.loop.call_later, 0.2, setattr, script, "refuses_requests", False)
    assert client.with_options(max_retries=2).completions.create(model="tiny", prompt="x").choices[0].text


def test_a_worker_that_dies_mid_stream_ends_it_with_an_error_event(start_fake_daemon: StartDaemon) -> None:
    daemon = start_fake_daemon()
    daemon.script.dies_after_tokens, daemon.script.token_delay_s = 5, 0.001
    with daemon.client() as http:
        response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, "stream": True})
        last = events_of(response)[-1]
        assert isinstance(last, dict)
        assert last["error"]["code"] == "worker_failed"
        again = http.post("/v1/chat/completions", json={"model": "tiny", "messages": QUESTION})
    assert again.json()["choices"][0]["message"]["content"] == ANSWER
    assert daemon.context.models.supervisor.num_restarts == 1


def test_a_model_that_left_in_between_is_loaded_again(daemon: FakeDaemon, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="x")
    daemon.link.loaded.clear()
    assert client.completions.create(model="tiny", prompt="x", max_tokens=200).choices[0].text == ANSWER


def test_keep_alive_zero_unloads_after_the_answer(daemon: FakeDaemon, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="x", extra_body={"keep_alive": 0})
    assert client.models.retrieve("tiny").model_extra["flashtensors"]["state"] == "on_disk"


def test_the_request_id_comes_back(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        assert http.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        odd = http.get("/v1/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
        assert odd != "a b\tc"
        assert http.get("/v1/nothing").status_code == 404


def test_a_request_that_can_never_find_room_is_not_told_to_try_again(start_fake_daemon: StartDaemon) -> None:
    with start_fake_daemon(max_queue=4).client() as http:
        body = {"model": "tiny", "prompt": ["a", "b"], "n": 3, "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200
        refused = http.post("/v1/completions", json=body | {"n": 4})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        assert "about 4 can wait for a model (max_queue)" in refused.json()["error"]["message"]
