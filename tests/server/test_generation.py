"""Deltas that come together: joined without losing or inventing a token."""

import random

from flashtensors.request import SequenceDelta, TokenLogprobs
from flashtensors.server.generation import join_deltas

from .conftest import ANSWER, FakeDaemon


def test_joined_deltas_say_what_they_said_apart() -> None:
    draw = random.Random(7)
    for _ in range(200):
        deltas: list[SequenceDelta] = []
        ended: set[int] = set()
        for token in range(draw.randint(1, 12)):
            index = draw.randrange(3)
            if index in ended:
                continue
            is_last = draw.random() < 0.2
            ended |= {index} if is_last else set()
            count = draw.randint(0 if is_last else 1, 3)
            deltas.append(
                SequenceDelta(
                    request_id="r",
                    index=index,
                    token_ids=[token] * count,
                    logprobs=[TokenLogprobs(-float(token), [])] * count or None,
                    finish_reason="stop" if is_last else None,
                    stop_token_id=token if is_last and count else None,
                    num_cached_tokens=5 if all(other.index != index for other in deltas) else 0,
                )
            )
        joined = join_deltas(deltas)
        assert len({delta.index for delta in joined}) == len(joined)
        for delta in joined:
            own = [one for one in deltas if one.index == delta.index]
            assert delta.token_ids == [token for one in own for token in one.token_ids]
            assert (delta.logprobs or []) == [position for one in own for position in one.logprobs or []]
            assert (delta.finish_reason, delta.stop_token_id) == (own[-1].finish_reason, own[-1].stop_token_id)
            assert delta.num_cached_tokens == 5


def test_a_stop_string_in_the_middle_of_a_delta_ends_tokens_and_logprobs_there(clean_daemon: FakeDaemon) -> None:
    """Tokens that came in one piece with a stop string, and after it, are not part of the answer."""
    stop = ANSWER[20:24]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "logprobs": 1, "stop": [stop]}
    with clean_daemon.client() as http:
        expected = http.post("/v1/completions", json=body).json()["choices"][0]
        clean_daemon.script.tokens_per_delta = 7
        found = http.post("/v1/completions", json=body).json()["choices"][0]
    assert found == expected
    assert found["text"] == ANSWER[: ANSWER.index(stop)]
