from __future__ import annotations

import pytest

from flashtensors.engine.sequence import derive_seed, find_max_length, make_sequences
from flashtensors.errors import ContextTooLong, RequestError

from .traffic import limits, request


def test_seeds_are_those_of_splitmix64() -> None:
    # First outputs of the reference generator started at 1234567 (Vigna, splitmix64.c).
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [derive_seed(1234567, index) for index in range(4)] == reference


def test_seeds_of_one_request_differ_and_fit_64_bits() -> None:
    for seed in (0, -1, -(2**63), 2**63 - 1):
        seeds = [derive_seed(seed, index) for index in range(128)]
        assert len(set(seeds)) == 128
        assert all(0 <= derived < 2**64 for derived in seeds)


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "expected"), [(3, 5, 8), (3, None, 128), (127, 1, 128), (127, None, 128)]
)
def test_an_answer_ends_at_max_tokens_or_at_the_context(
    num_prompt_tokens: int, max_tokens: int | None, expected: int
) -> None:
    wanted = request("r", [1] * num_prompt_tokens, max_tokens=max_tokens)
    assert find_max_length(wanted, limits()) == expected


def test_the_cache_bounds_the_context_where_it_is_the_smaller() -> None:
    assert find_max_length(request("r", [1], max_tokens=None), limits(num_blocks=5)) == 20


def test_too_long_says_the_numbers_and_what_to_do() -> None:
    with pytest.raises(ContextTooLong) as caught:
        find_max_length(request("r", [1] * 100, max_tokens=29), limits())
    assert caught.value.message == (
        "the prompt has 100 tokens and max_tokens is 29, together 129, but the model's context is 128 tokens; "
        "set max_tokens to 28 or less, or shorten the prompt"
    )
    assert (caught.value.param, caught.value.http_status) == ("max_tokens", 400)


@pytest.mark.parametrize("max_tokens", [None, 1])
def test_a_prompt_that_leaves_no_room_is_refused(max_tokens: int | None) -> None:
    with pytest.raises(ContextTooLong) as caught:
        find_max_length(request("r", [1] * 128, max_tokens=max_tokens), limits())
    assert caught.value.message == (
        "the prompt has 128 tokens, but the model's context is 128 tokens and the answer needs at least 1 of them; "
        "shorten the prompt to 127 tokens"
    )
    assert caught.value.param == "prompt"


def test_the_message_names_the_cache_where_that_is_the_limit() -> None:
    with pytest.raises(ContextTooLong, match="the KV cache's capacity is 20 tokens"):
        find_max_length(request("r", [1] * 20), limits(num_blocks=5))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt has no tokens"):
        find_max_length(request("r", []), limits())


def test_stop_ids_are_the_models_unless_ignored_and_the_requests() -> None:
    stops = {
        ignore_eos: make_sequences(
            request("r", [1], stop_token_ids=[9], ignore_eos=ignore_eos), [2], max_length=9, turn=(0,) * 5, seed=0
        )[0]
        .slot_start()
        .stop_token_ids
        for ignore_eos in (False, True)
    }
    assert stops == {False: [2, 9], True: [9]}
