"""Text and token ids of an answer, from its deltas."""

import pytest

from flashtensors.request import EngineRequest, SamplingParams, SequenceDelta, TokenLogprobs
from flashtensors.testing.checkpoints import write_tiny_tokenizer
from flashtensors.text.tokenizer import Tokenizer
from flashtensors.worker.outputs import OutputBuilder

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def builder(tokenizer: Tokenizer, **sampling: object) -> OutputBuilder:
    params = SamplingParams(max_tokens=100, **sampling)  # pyright: ignore
    request = EngineRequest(request_id="r", model="m", prompt_token_ids=[5], sampling=params)
    return OutputBuilder(request, "?", tokenizer)


def delta(token_ids: list[int], **fields: object) -> SequenceDelta:
    return SequenceDelta(**{"request_id": "r", "index": 0, "token_ids": token_ids, **fields})  # pyright: ignore


def test_text_grows_with_tokens_and_outputs_do_not_change(tokenizer: Tokenizer) -> None:
    built = builder(tokenizer)
    first, second = tokenizer.encode("hello the"), tokenizer.encode(" thing")
    built.push(delta(first, num_cached_tokens=16))
    before = built.output()
    built.push(delta(second, finish_reason="length"))
    assert (before.outputs[0].text, before.outputs[0].token_ids, before.finished) == ("hello the", first, False)
    after = built.output()
    assert (after.outputs[0].text, after.outputs[0].token_ids, after.finished) == (
        "hello the thing",
        first + second,
        True,
    )
    assert (after.outputs[0].finish_reason, after.outputs[0].stop_reason, after.num_cached_tokens) == (
        "length",
        None,
        16,
    )


def test_a_stop_string_cuts_text_and_tokens_and_asks_to_abort(tokenizer: Tokenizer) -> None:
    built = builder(tokenizer, stop=["he t"], logprobs=0)
    token_ids = tokenizer.encode("say the thing again")
    logprobs = [TokenLogprobs(logprob=-float(position), top=[]) for position in range(len(token_ids))]
    assert built.push(delta(token_ids, logprobs=logprobs))
    (answer,) = built.output().outputs
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("say t", "stop", "he t")
    assert "he t" in tokenizer.decode(answer.token_ids)
    assert "he t" not in tokenizer.decode(answer.token_ids[:-1])
    assert answer.logprobs == logprobs[: len(answer.token_ids)]
    assert not built.push(delta([7, 8], finish_reason="stop")), "what the engine computed meanwhile"
    assert built.output().outputs == [answer]
    assert built.num_open == 0, "an answer ends once"


def test_a_stop_string_in_the_last_tokens_needs_no_abort(tokenizer: Tokenizer) -> None:
    built = builder(tokenizer, stop=["thing"])
    assert not built.push(delta(tokenizer.encode("the thing"), finish_reason="length"))
    (answer,) = built.output().outputs
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("the ", "stop", "thing")


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    built = builder(tokenizer, stop=["things"])
    built.push(delta(tokenizer.encode("the thing")))
    assert built.output().outputs[0].text == "the "
    built.push(delta([], finish_reason="length"))
    assert built.output().outputs[0].text == "the thing"


@pytest.mark.parametrize(("sampling", "stop_reason"), [({}, None), ({"stop_token_ids": [260]}, 260)])
def test_the_token_that_ends_an_answer_is_an_id_but_no_text(
    tokenizer: Tokenizer, sampling: dict[str, object], stop_reason: int | None
) -> None:
    stop_id = stop_reason or EOS
    built = builder(tokenizer, **sampling)
    built.push(delta([*tokenizer.encode("hello"), stop_id], finish_reason="stop", stop_token_id=stop_id))
    (answer,) = built.output().outputs
    assert (answer.text, answer.token_ids[-1], answer.finish_reason) == ("hello", stop_id, "stop")
    assert answer.stop_reason == stop_reason


def test_answers_are_kept_apart(tokenizer: Tokenizer) -> None:
    built = builder(tokenizer, n=2)
    hello, thing = tokenizer.encode("hello"), tokenizer.encode("thing")
    built.push(delta(thing, index=1, finish_reason="length"))
    assert (built.is_finished, built.num_open) == (False, 1)
    built.push(delta(hello, index=0, finish_reason="abort"))
    assert built.is_finished
    answers = built.output().outputs
    assert [(answer.index, answer.text) for answer in answers] == [(0, "hello"), (1, "thing")]
