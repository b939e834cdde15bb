"""How tokens become text, one token at a time, with the result that decoding them all at once would have.

`tokenizer.json` names a decoder for whole sequences. Two families cover the models we run:

- byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2): each character of a token stands for one byte;
- SentencePiece-like BPE with byte fallback (Llama 2, Mistral, Gemma): `▁` stands for a space, and `<0xE4>` for a byte.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import UnsupportedModel

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextDecoder(Protocol):
    """Turns the tokens of one sequence into text as they come."""

    def push(self, token: str) -> str:
        """Text that `token` completes; never part of a character."""
        ...

    def push_all(self, tokens: Iterable[str]) -> str:
        """What pushing one after the other would return, joined; cheaper for many."""
        ...

    def flush(self) -> str:
        """The rest at the end of the sequence; bytes that are not UTF-8 become U+FFFD."""
        ...


class DecoderSpec(Protocol):
    """A decoder as `tokenizer.json` describes it."""

    def start(self) -> TextDecoder:
        """A decoder at the start of a sequence."""
        ...

    def token_bytes(self, token: str) -> bytes:
        """Bytes that `token` stands for inside a sequence."""
        ...


@dataclass(frozen=True)
class ByteLevelSpec:
    """Every character of a token is one byte, in GPT-2's printable alphabet."""

    byte_of: Mapping[str, int]
    _known: dict[str, bytes] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Tokens that were asked for, of which a vocabulary has no more than it has."""

    def start(self) -> TextDecoder:
        """A decoder at the start of a sequence."""
        return _ByteLevelDecoder(self)

    def token_bytes(self, token: str) -> bytes:
        """Bytes that `token` stands for; a token with a character outside the alphabet stands for itself."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._spell(token)
        return known

    def _spell(self, token: str) -> bytes:
        try:
            return bytes([self.byte_of[character] for character in token])
        except KeyError:
            return token.encode()


class _ByteLevelDecoder:
    def __init__(self, spec: ByteLevelSpec) -> None:
        self._spec = spec
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> str:
        return self._utf8.decode(self._spec.token_bytes(token))

    def push_all(self, tokens: Iterable[str]) -> str:
        return self._utf8.decode(b"".join(map(self._spec.token_bytes, tokens)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True)
class SentencePieceSpec:
    """Tokens are text with a stand-in for the space; bytes outside the vocabulary are tokens such as `<0xE4>`."""

    token_replacements: tuple[tuple[str, str], ...] = ()
    """Applied to each token before bytes are joined."""
    text_replacements: tuple[tuple[str, str], ...] = ()
    """Applied to text after bytes are joined; each pattern is one character."""
    has_byte_fallback: bool = False
    num_stripped: int = 0
    """Most `stripped` characters to drop from the start of a sequence."""
    stripped: str = " "

    def start(self) -> TextDecoder:
        """A decoder at the start of a sequence."""
        return _SentencePieceDecoder(self)

    def token_bytes(self, token: str) -> bytes:
        """Bytes that `token` stands for inside a sequence."""
        replaced = _replace(token, self.token_replacements)
        byte = self.find_byte(replaced)
        return bytes([byte]) if byte is not None else _replace(replaced, self.text_replacements).encode()

    def find_byte(self, token: str) -> int | None:
        """The byte that `token` stands for, if it stands for one."""
        match = _BYTE_TOKEN.fullmatch(token) if self.has_byte_fallback else None
        return int(match[1], 16) if match else None


class _SentencePieceDecoder:
    def __init__(self, spec: SentencePieceSpec) -> None:
        self._spec = spec
        self._byte_run = bytearray()
        self._num_to_strip = spec.num_stripped

    def push(self, token: str) -> str:
        token = _replace(token, self._spec.token_replacements)
        byte = self._spec.find_byte(token)
        if byte is not None:
            self._byte_run.append(byte)
            return ""
        return self._finish(self._end_byte_run() + token)

    def push_all(self, tokens: Iterable[str]) -> str:
        return "".join(map(self.push, tokens))

    def flush(self) -> str:
        return self._finish(self._end_byte_run())

    def _end_byte_run(self) -> str:
        # A run of bytes is text only as a whole: one bad byte makes U+FFFD of each of them, as in `tokenizers`.
        run = bytes(self._byte_run)
        self._byte_run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _finish(self, text: str) -> str:
        text = _replace(text, self._spec.text_replacements)
        while self._num_to_strip and text:
            if text[0] != self._spec.stripped:
                self._num_to_strip = 0
                break
            self._num_to_strip -= 1
            text = text[1:]
        return text


def _replace(text: str, replacements: Sequence[tuple[str, str]]) -> str:
    for old, new in replacements:
        text = text.replace(old, new)
    return text


def parse_decoder(spec: Mapping[str, object] | None, *, where: str) -> DecoderSpec:
    """The decoder that `tokenizer.json` describes; `UnsupportedModel` for one outside the two families."""
    steps = _steps(spec)
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return ByteLevelSpec(byte_alphabet())
    token_replacements: list[tuple[str, str]] = []
    text_replacements: list[tuple[str, str]] = []
    seen: list[object] = []
    num_stripped, stripped = 0, " "
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                old and "Strip" not in seen
            ):
                is_early = not {"ByteFallback", "Fuse"}.intersection(seen)
                if not is_early and len(old) != 1:
                    raise _unsupported(step, where)
                (token_replacements if is_early else text_replacements).append((old, new))
            case {"type": "ByteFallback"} if "Fuse" not in seen:
                pass
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": str(stripped), "start": int(num_stripped), "stop": 0} if "Fuse" in seen:
                pass
            case _:
                raise _unsupported(step, where)
        seen.append(step.get("type"))
    if "ByteFallback" not in seen and "Replace" not in seen:
        raise _unsupported(spec, where)
    return SentencePieceSpec(
        token_replacements=tuple(token_replacements),
        text_replacements=tuple(text_replacements),
        has_byte_fallback="ByteFallback" in seen,
        num_stripped=num_stripped,
        stripped=stripped,
    )


def _steps(spec: Mapping[str, object] | None) -> list[Mapping[str, object]]:
    match spec:
        case {"type": "Sequence", "decoders": [*steps]}:
            return [step for step in steps if isinstance(step, Mapping)]
        case None:
            return []
        case _:
            return [spec]


def _unsupported(step: Mapping[str, object] | None, where: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where}: decoder step {step!r} is not one that can be streamed; "
        "byte-level BPE and SentencePiece-like BPE with byte fallback are"
    )


def byte_alphabet() -> dict[str, int]:
    """GPT-2's reversible map from printable characters to bytes (`bytes_to_unicode` in openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
