"""A stream against decoding everything at once, whatever pieces its tokens come in."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashtensors.text.stream import TextStream
from flashtensors.text.tokenizer import Tokenizer

from .test_stop import naive_match

_FAMILIES = ["byte_level", "sentencepiece", "gemma_like"]
_SAMPLES = [
    "",
    " leading and  double spaces ",
    "👩‍👩‍👧‍👦 family, flags 🇩🇪, skin 👍🏽",
    "你好,世界。 Привет мир",
    "tab\tnew\nline\r\n\x00\x1b",
    "السلام عليكم – שלום",
    "e\u0301 and \u00e9, \ufffd itself, \U0010ffff",
    "<think>the <|im_end|> stop </s> <0x41> <a tool>",
]
_fixed_settings = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=_FAMILIES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def stream_all(stream: TextStream, token_ids: Sequence[int], sizes: Sequence[int]) -> str:
    shown = ""
    position = 0
    for size in [*sizes, len(token_ids)]:
        shown += stream.push(token_ids[position : position + size])
        position += size
        assert stream.text == shown
    shown += stream.flush()
    assert stream.text == shown
    return shown


_SIZES = st.lists(st.integers(0, 4), max_size=40)


@_fixed_settings
@given(data=st.data(), sizes=_SIZES, skips=st.booleans())
def test_any_tokens_in_any_pieces_make_the_decoded_text(
    tokenizer: Tokenizer, data: st.DataObject, sizes: list[int], skips: bool
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    stream = TextStream(tokenizer, skip_special_tokens=skips)
    expected = tokenizer.decode(token_ids, skip_special_tokens=skips)
    assert stream_all(stream, token_ids, sizes) == expected


@_fixed_settings
@given(text=st.text(max_size=40), sizes=_SIZES)
def test_any_text_in_any_pieces_comes_back(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    token_ids = tokenizer.encode(text)
    assert stream_all(TextStream(tokenizer), token_ids, sizes) == tokenizer.decode(token_ids)


@_fixed_settings
@given(data=st.data(), stops=st.lists(st.text("stop 🙂é", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_the_text_where_a_naive_search_does(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    text = data.draw(st.text("stop 🙂éx", max_size=30))
    token_ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stop=stops)
    shown = "".join(stream.push([token_id]) for token_id in token_ids) + stream.flush()
    whole = tokenizer.decode(token_ids)
    expected = naive_match(whole, stops)
    if expected is None:
        assert (shown, stream.stopped_by) == (whole, None)
    else:
        stop, end = expected
        assert (shown, stream.stopped_by) == (whole[: end - len(stop)], stop)


@pytest.mark.parametrize("text", _SAMPLES)
def test_samples_token_by_token(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    shown = stream_all(TextStream(tokenizer), token_ids, [1] * len(token_ids))
    assert shown == tokenizer.decode(token_ids)


def test_half_a_character_is_never_shown(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("👩")
    assert len(token_ids) > 1
    stream = TextStream(byte_level)
    assert [stream.push([token_id]) for token_id in token_ids] == [""] * (len(token_ids) - 1) + ["👩"]


def test_unfinished_character_becomes_a_replacement_at_the_end(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a👩")[:-1]
    stream = TextStream(byte_level)
    assert stream.push(token_ids) + stream.flush() == "a\ufffd" == byte_level.decode(token_ids)


def test_endless_invalid_bytes_are_shown_as_they_come(byte_level: Tokenizer) -> None:
    invalid = next(token_id for token_id in range(byte_level.vocab_size) if byte_level.token_bytes(token_id) == b"\xff")
    stream = TextStream(byte_level)
    assert [stream.push([invalid]) for _ in range(3)] == ["\ufffd"] * 3


def test_only_what_may_begin_a_stop_string_is_held_back(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, stop=["stop!"])
    assert stream.push(byte_level.encode("ok sto")) == "ok "
    assert stream.push(byte_level.encode("ne")) == "stone"
    assert stream.stopped_by is None


def test_nothing_follows_a_stop_string(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, stop=["END"])
    assert stream.push(byte_level.encode("abENDcd")) == "ab"
    assert stream.push(byte_level.encode("ef")) == ""
    assert stream.flush() == ""
    assert (stream.text, stream.stopped_by) == ("ab", "END")


def test_stop_string_can_come_with_the_last_bytes(sentencepiece: Tokenizer) -> None:
    byte = sentencepiece.encode("x\n")[-1]
    assert sentencepiece.token_bytes(byte) == b"\n"
    stream = TextStream(sentencepiece, stop=["\n"])
    shown = stream.push([*sentencepiece.encode("x"), byte])
    assert (shown + stream.flush(), stream.stopped_by) == ("x", "\n")


def test_special_tokens_are_left_out_unless_asked_for(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("hi<|im_end|>")
    assert TextStream(byte_level).push(token_ids) == "hi"
    assert TextStream(byte_level, skip_special_tokens=False).push(token_ids) == "hi<|im_end|>"
