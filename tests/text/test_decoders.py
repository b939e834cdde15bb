"""What `tokenizer.json` may say about decoding, and what is refused."""

import pytest

from flashtensors.errors import UnsupportedModel
from flashtensors.text.decoders import ByteLevelSpec, SentencePieceSpec, byte_alphabet, parse_decoder
from flashtensors.text.tokenizer import Tokenizer

_SPACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_BYTES = {"type": "ByteFallback"}
_FUSE = {"type": "Fuse"}


def sequence(*steps: object) -> dict[str, object]:
    return {"type": "Sequence", "decoders": list(steps)}


def decode(spec: dict[str, object], tokens: list[str]) -> str:
    decoder = parse_decoder(spec, where="tokenizer.json").start()
    return "".join(decoder.push(token) for token in tokens) + decoder.flush()


def test_byte_alphabet_names_every_byte_once() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("steps", [(_SPACE, _BYTES, _FUSE), (_BYTES, _FUSE, _SPACE), (_BYTES, _SPACE)])
def test_steps_may_come_in_any_order_that_models_use(steps: tuple[object, ...]) -> None:
    assert decode(sequence(*steps), ["▁a", "<0xE4>", "<0xBD>", "<0xA0>", "▁b"]) == " a你 b"


def test_space_stand_in_from_bytes_is_replaced_only_after_bytes_are_joined() -> None:
    stand_in = ["<0xE2>", "<0x96>", "<0x81>"]
    assert decode(sequence(_SPACE, _BYTES, _FUSE), stand_in) == "▁"
    assert decode(sequence(_BYTES, _FUSE, _SPACE), stand_in) == " "


def test_one_bad_byte_spoils_its_run() -> None:
    assert decode(sequence(_SPACE, _BYTES, _FUSE), ["<0xC3>", "<0xA9>", "<0xFF>", "x"]) == "\ufffd" * 3 + "x"


def test_first_spaces_are_stripped_across_tokens() -> None:
    spec = sequence(_SPACE, _BYTES, _FUSE, {"type": "Strip", "content": " ", "start": 2, "stop": 0})
    assert decode(spec, ["▁", "▁", "▁a", "▁b"]) == " a b"


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        _FUSE,
        sequence(_BYTES, _FUSE, {"type": "Replace", "pattern": {"String": "ab"}, "content": "c"}),
        sequence(_BYTES, {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "c"}),
        sequence(_BYTES, _FUSE, {"type": "Strip", "content": " ", "start": 0, "stop": 1}),
        sequence(_FUSE, _BYTES),
    ],
)
def test_decoders_that_cannot_be_streamed_are_refused(spec: dict[str, object] | None) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json: decoder"):
        parse_decoder(spec, where="tokenizer.json")


def test_bytes_of_tokens_add_up_to_the_text(byte_level: Tokenizer, gemma_like: Tokenizer) -> None:
    for tokenizer in (byte_level, gemma_like):
        text = "a é 👩 <think> \n"
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids).decode() == text


def test_part_of_a_character_has_bytes_but_no_text(byte_level: Tokenizer) -> None:
    first = byte_level.encode("👩")[0]
    assert "👩".encode().startswith(byte_level.token_bytes(first))
    assert byte_level.token_text(first).endswith("\ufffd")


def test_id_without_a_token_is_empty(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(10**6) == b""
    assert byte_level.token_text(10**6) == ""


@pytest.mark.parametrize("spec", [ByteLevelSpec(byte_alphabet()), SentencePieceSpec(has_byte_fallback=True)])
def test_many_tokens_at_once_are_those_tokens_one_by_one(spec: ByteLevelSpec | SentencePieceSpec) -> None:
    tokens = ["Ã", "¶x", "<0xE4>", "<0xB8>", "plain", "▁word", "é", "<0x80>", "Ġa"]
    for cut in range(len(tokens) + 1):
        alone, together = spec.start(), spec.start()
        expected = "".join(alone.push(token) for token in tokens) + alone.flush()
        assert together.push_all(tokens[:cut]) + together.push_all(tokens[cut:]) + together.flush() == expected
