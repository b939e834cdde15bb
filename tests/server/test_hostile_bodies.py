"""Bodies that mean harm: each is answered with a 4xx in the right shape, and the daemon goes on."""

import itertools

import msgspec
import pytest

from .conftest import FakeDaemon

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
GENERATING = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "x"},
    "/api/generate": {"model": "tiny", "prompt": "x"},
    "/api/chat": CHAT,
}
OTHERS = ("/api/show", "/api/pull", "/api/load")
NOT_JSON = (
    b"", b" ", b"{", b"}", b"[]", b"null", b"true", b"1", b'"x"', b"{]", b"{'model': 'tiny'}", b"NaN", b"\x00",
    b'{"model": NaN}', b'{"model": 1e999}', b'{"model": "\\ud800"}', b'{"model": "\\ud800\\ud800"}',
    b'{"model": "\xff"}', b'{"model": "\xc3("}', b'{"model": "tiny",}', b'{"model": "tiny"}{"model": "tiny"}',
    b"[" * 50_000, b'{"a":' * 50_000, b'{"a":[' * 50_000, b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"model=tiny",
)  # fmt: skip
WRONG_FIELDS: tuple[dict[str, object], ...] = (
    {"model": None},
    {"model": 5},
    {"model": ["tiny"]},
    {"model": {"a": 1}},
    {"model": "../../../etc/passwd"},
    {"model": "tiny\u0000"},
    {"model": "x" * 100_000},
    {"model": ""},
    {"stream": "yes"},
    {"stream": 1},
    {"keep_alive": {}},
    {"keep_alive": "1 fortnight"},
    {"keep_alive": True},
    {"__class__": "x"},
    {"": 1},
    {"a" * 100_000: 1},
    {"logprobs": "x"},
    {"top_logprobs": 10**9},
)
WRONG_SAMPLING: tuple[dict[str, object], ...] = (
    {"temperature": -1},
    {"temperature": "1"},
    {"temperature": [1]},
    {"temperature": 10**400},
    {"top_p": 0},
    {"top_p": 1.01},
    {"top_p": -0.0},
    {"n": 0},
    {"n": -(2**63)},
    {"n": 16384},
    {"n": 1.5},
    {"n": False},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_tokens": "many"},
    {"min_tokens": -1},
    {"min_tokens": 100, "max_tokens": 1},
    {"top_k": -2},
    {"top_k": 1.5},
    {"min_p": 2},
    {"seed": 2**64},
    {"seed": "x"},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1},
    {"presence_penalty": 99},
    {"frequency_penalty": -99},
    {"stop": [""]},
    {"stop": ["x"] * 17},
    {"stop": [1]},
    {"stop": {"a": 1}},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [10**12]},
    {"stop_token_ids": ["a"]},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"999999": 1}},
    {"logit_bias": {"1": 1000}},
    {"logit_bias": [1]},
    {"stream_options": {"include_usage": True}},
    {"stream_options": []},
    {"ignore_eos": "no"},
)
WRONG_MESSAGES: tuple[object, ...] = (
    [],
    None,
    "hello",
    [None],
    [[]],
    [{}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{"role": "root", "content": "x"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": "x", "evil": 1}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": "word " * 5000}],
)
WRONG_PROMPTS: tuple[object, ...] = (
    None, "", [], {}, 5, True, [None], [""], [[]], [-1], [304], [2**70], [[1], "x"], [[["x"]]], [1.5], "x " * 5000,
)  # fmt: skip
HOSTILE: list[tuple[str, bytes]] = [
    *itertools.product([*GENERATING, *OTHERS], NOT_JSON),
    *((path, msgspec.json.encode({**body, **wrong})) for path, body in GENERATING.items() for wrong in WRONG_FIELDS),
    *((path, msgspec.json.encode({**GENERATING[path], **wrong}))
      for path in ("/v1/chat/completions", "/v1/completions") for wrong in WRONG_SAMPLING),
    *(("/v1/chat/completions", msgspec.json.encode({**CHAT, "messages": wrong})) for wrong in WRONG_MESSAGES),
    *(("/v1/completions", msgspec.json.encode({"model": "tiny", "prompt": wrong})) for wrong in WRONG_PROMPTS),
]  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 300


def test_each_is_refused_and_the_daemon_goes_on(clean_daemon: FakeDaemon) -> None:
    with clean_daemon.client() as http:
        for path, body in HOSTILE:
            response = http.post(path, content=body, headers={"content-type": "application/json"})
            assert 400 <= response.status_code < 500, (path, body[:200], response.status_code, response.text[:200])
            error = response.json()["error"]
            message = error["message"] if path.startswith("/v1") else error
            assert message, (path, body[:200])
            assert len(response.content) < 2000, "an error does not send its cause back"
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/generate"])
def test_other_methods_are_405(clean_daemon: FakeDaemon, path: str) -> None:
    with clean_daemon.client() as http:
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            response = http.request(method, path)
            assert response.status_code == 405
            assert response.json()["error"]
