"""A daemon process with a real worker and a tiny random model on the CPU, driven by the official clients."""

import concurrent.futures
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import ollama
import openai
import pytest

from flashtensors.config import Settings
from flashtensors.server.launch import DaemonInfo, find_daemon, start_daemon, stop_daemon

QUESTION = [{"role": "user", "content": "hello there, what is the answer?"}]
GREEDY = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
LONG = {"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 480, "ignore_eos": True}


def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s"
        time.sleep(0.01)


def daemon_settings(store: Path) -> Settings:
    return Settings(storage_path=str(store), server_port=0, device="cpu", kv_cache_size=4 << 20, shutdown_timeout_s=20)


@pytest.fixture(scope="module")
def running(tiny_store: Path) -> Iterator[DaemonInfo]:
    settings = daemon_settings(tiny_store)
    info = start_daemon(settings)
    yield info
    stop_daemon(settings)


@pytest.fixture(scope="module")
def client(running: DaemonInfo) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def http(running: DaemonInfo) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as http:
        yield http


def num_busy(http: httpx.Client) -> int:
    return sum(model["num_running"] + model["num_waiting"] for model in http.get("/api/ps").json()["models"])


def kv_usage(http: httpx.Client) -> float:
    return max(model["kv_usage"] for model in http.get("/api/ps").json()["models"])


def streamed_text(client: openai.OpenAI, **arguments: object) -> str:
    stream = client.chat.completions.create(**{**GREEDY, **arguments, "stream": True})
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


def test_a_chat_says_the_same_streamed_or_not(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**GREEDY)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 24
    assert completion.choices[0].message.content
    assert streamed_text(client) == completion.choices[0].message.content


def test_the_prefix_cache_is_reported(client: openai.OpenAI) -> None:
    prompt = {**GREEDY, "messages": [{"role": "user", "content": "the same long words again and again " * 8}]}
    for _ in range(2):
        usage = client.chat.completions.create(**prompt).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_n_answers_with_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str | None]:
        sampled = {**GREEDY, "temperature": 1.0, "n": 3, "seed": seed}
        return [choice.message.content for choice in client.chat.completions.create(**sampled).choices]

    first = texts(1)
    assert len(set(first)) == 3
    assert texts(1) == first
    assert texts(2) != first


def test_logprobs_of_greedy_tokens_are_the_largest(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 24
    for position in logprobs.content:
        assert len(position.top_logprobs) == 3
        assert position.logprob == position.top_logprobs[0].logprob <= 0


def test_stop_strings_and_stop_tokens(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(**GREEDY).choices[0].message.content
    assert text is not None
    stop = text[6:9]
    stopped = client.chat.completions.create(**GREEDY, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert streamed_text(client, stop=stop) == text[: text.index(stop)]


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["hello", "the end of", "a"]
    arguments = {"model": "plain", "temperature": 0, "max_tokens": 10}
    together = client.completions.create(prompt=prompts, **arguments)
    alone = [client.completions.create(prompt=prompt, **arguments).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_the_ollama_client_gets_the_same_text(running: DaemonInfo, client: openai.OpenAI) -> None:
    expected = client.completions.create(model="plain", prompt="hello", temperature=0, max_tokens=10).choices[0].text
    with ollama.Client(host=running.url, timeout=60) as other:
        answer = other.generate("plain", "hello", options={"temperature": 0, "num_predict": 10})
    assert answer.response == expected
    assert answer.eval_duration is not None
    assert answer.eval_duration > 0


def test_64_streams_at_once_each_say_what_they_say_alone(client: openai.OpenAI) -> None:
    expected = streamed_text(client)
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda _: streamed_text(client), range(64)))
    assert texts == [expected] * 64


def test_leaving_gives_the_blocks_back(http: httpx.Client) -> None:
    for is_stream in (True, False):
        with httpx.Client(base_url=http.base_url, timeout=60) as other:
            request = other.build_request("POST", "/v1/completions", json={**LONG, "stream": is_stream})
            if is_stream:
                response = other.send(request, stream=True)
                next(response.iter_lines())
                response.close()
            else:
                thread = threading.Thread(target=_send_and_be_cut_off, args=(other, request))
                thread.start()
                until(lambda: num_busy(http) == 1)
        until(lambda: num_busy(http) == 0 and kv_usage(http) == 0)
        if not is_stream:
            thread.join()


def _send_and_be_cut_off(client: httpx.Client, request: httpx.Request) -> None:
    with pytest.raises((httpx.HTTPError, RuntimeError)):
        client.send(request)


def test_the_context_is_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="hello " * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_metrics_count_what_was_done(http: httpx.Client) -> None:
    http.post("/v1/completions", json={**LONG, "max_tokens": 5, "stream": True}).raise_for_status()
    text = http.get("/metrics").text
    for name in ("model_loads_total", "prompt_tokens_total", "generation_tokens_total",
                 "time_to_first_token_seconds_count", "e2e_request_latency_seconds_count"):  # fmt: skip
        match = re.search(rf'^flashtensors_{name}{{model_name="tiny"[^}}]*}} (\S+)$', text, re.MULTILINE)
        assert match is not None, name
        assert float(match[1]) >= 1


def test_load_and_unload(http: httpx.Client) -> None:
    http.post("/api/generate", json={"model": "tiny", "keep_alive": 0}).raise_for_status()
    assert "tiny" not in {model["name"] for model in http.get("/api/ps").json()["models"]}
    lines = http.post("/api/load", json={"model": "tiny"}).text.splitlines()
    assert json.loads(lines[-1])["was_loaded"] is False
    assert "tiny" in {model["name"] for model in http.get("/api/ps").json()["models"]}


def test_a_killed_worker_ends_streams_in_order_and_is_replaced(http: httpx.Client, client: openai.OpenAI) -> None:
    expected = client.chat.completions.create(**GREEDY).choices[0].message.content
    worker = http.get("/api/ps").json()["worker"]
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(worker["pid"], signal.SIGKILL)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(events[-1])["error"]["code"] == "worker_failed"
    assert client.chat.completions.create(**GREEDY).choices[0].message.content == expected
    after = http.get("/api/ps").json()["worker"]
    assert after["num_restarts"] == worker["num_restarts"] + 1
    assert after["pid"] != worker["pid"]


@pytest.fixture
def own_daemon(store: Path, tiny_store: Path) -> Iterator[DaemonInfo]:
    (store / "catalog").symlink_to(tiny_store / "catalog")
    settings = daemon_settings(store)
    info = start_daemon(settings)
    httpx.post(f"{info.url}/api/load", json={"model": "tiny", "stream": False}, timeout=60).raise_for_status()
    yield info
    until(lambda: find_daemon(settings) is None)


def test_a_daemon_asked_to_stop_finishes_what_runs(own_daemon: DaemonInfo) -> None:
    url = own_daemon.url
    with httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(own_daemon.pid, signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        refused = httpx.post(f"{url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.slow
def test_a_second_signal_cuts_off_what_runs(own_daemon: DaemonInfo) -> None:
    url = own_daemon.url
    body = {**LONG, "stream": True, "n": 64}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(own_daemon.pid, signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/ready").status_code == 503)
        os.kill(own_daemon.pid, signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(events[-1])["error"]["code"] == "worker_failed"
