"""The tokenizer against transformers on small folders, and the files that it reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashtensors.errors import CheckpointError, RequestError, TemplateError
from flashtensors.text.tokenizer import Tokenizer

from .conftest import write_byte_level

_TEXTS = [
    "",
    " ",
    "a  b\tc\n\n",
    "the quick <|im_start|>brown<|im_end|> fox <think> <|endoftext|>",
    "<|im_end> <|im_end|><|im_end|>",
    "é e\u0301 你好 👩‍👩‍👧 \x00 \u202eعربي",
    "<s> </s> <unk> <0x41>",
]
_CHAT = [{"role": "user", "content": "Hi {{ 1 + 1 }} {% x %}"}, {"role": "assistant", "content": "  Hello. "}]


def oracle(folder: Path) -> Any:
    """transformers' tokenizer of the same folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(byte_level_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(byte_level_folder, tmp_path / "model"))


@pytest.mark.parametrize("family", ["byte_level_folder", "sentencepiece_folder"])
def test_ids_and_text_equal_those_of_transformers(family: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(family)
    tokenizer, expected = Tokenizer.from_folder(folder), oracle(folder)
    for text in _TEXTS:
        token_ids = tokenizer.encode(text)
        assert token_ids == expected.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False)
        for skips in (True, False):
            assert tokenizer.decode(token_ids, skip_special_tokens=skips) == expected.decode(
                token_ids, skip_special_tokens=skips
            )
    assert tokenizer.vocab_size == len(expected)


def test_chat_equals_that_of_transformers(byte_level_folder: Path) -> None:
    tokenizer, expected = Tokenizer.from_folder(byte_level_folder), oracle(byte_level_folder)
    for adds_prompt in (True, False):
        assert tokenizer.render_chat(_CHAT, add_generation_prompt=adds_prompt) == expected.apply_chat_template(
            _CHAT, add_generation_prompt=adds_prompt, tokenize=False
        )
        assert tokenizer.encode_chat(_CHAT, add_generation_prompt=adds_prompt) == expected.apply_chat_template(
            _CHAT, add_generation_prompt=adds_prompt, return_dict=False
        )


def test_tokens_outside_tokenizer_json_are_added_as_transformers_adds_them(folder: Path) -> None:
    content = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    change_tokenizer(folder, lambda value: value["added_tokens"][2].update(special=False))  # <|im_end|>, named as eos
    change_config(
        folder,
        added_tokens_decoder={
            "900": {"content": "<tool_call>", **content, "special": False},
            "901": {"content": "<|eom|>", **content, "special": True},
        },
        pad_token="<|pad|>",
        additional_special_tokens=["<|extra|>", "<think>"],
        image_token="<|image|>",
    )
    tokenizer, expected = Tokenizer.from_folder(folder), oracle(folder)
    text = "a<tool_call> b<|eom|> <|pad|>c <|extra|><think> <|image|><|im_end|>"
    token_ids = tokenizer.encode(text)
    assert token_ids == expected.encode(text)
    assert tokenizer.decode(token_ids) == expected.decode(token_ids, skip_special_tokens=True)
    assert tokenizer.vocab_size == len(expected)


def test_special_tokens_map_counts_where_the_config_has_no_added_tokens(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (tokenizer.encode("<|endoftext|>")[0],)
    assert tokenizer.eos_token_ids == (oracle(folder).eos_token_id,)


def test_post_processor_decides_about_bos_whatever_the_config_says(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "model"))
    change_config(folder, add_bos_token=False, add_eos_token=True)
    assert Tokenizer.from_folder(folder).encode("the fox") == oracle(folder).encode("the fox")
    assert Tokenizer.from_folder(folder).bos_token_id == 1


def test_legacy_flags_count_where_there_is_no_post_processor(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sentencepiece_folder, tmp_path / "model"))
    plain = Tokenizer.from_folder(folder).encode("the fox", add_special_tokens=False)
    change_tokenizer(folder, lambda value: value.update(post_processor=None))
    assert Tokenizer.from_folder(folder).encode("the fox") == plain
    change_config(folder, add_bos_token=True, add_eos_token=True)
    assert Tokenizer.from_folder(folder).encode("the fox") == [1, *plain, 2]
    assert Tokenizer.from_folder(folder).encode("the fox", add_special_tokens=False) == plain


def test_truncation_and_padding_in_the_file_are_not_applied(folder: Path) -> None:
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    whole = Tokenizer.from_folder(folder).encode("the quick brown fox")
    change_tokenizer(folder, lambda value: value.update(truncation=truncation, padding=padding))
    assert (
        Tokenizer.from_folder(folder).encode("the quick brown fox")
        == whole
        == oracle(folder).encode("the quick brown fox")
    )


def test_split_special_tokens_encodes_them_as_text(folder: Path) -> None:
    change_config(folder, split_special_tokens=True)
    token_ids = Tokenizer.from_folder(folder).encode("<|im_end|>")
    assert len(token_ids) > 1
    assert token_ids == oracle(folder).encode("<|im_end|>")


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        (None, None, (2,)),
        ({"eos_token_id": 1}, {"eos_token_id": 0}, (1, 2)),
        ({"eos_token_id": [1, 0, 2]}, None, (1, 0, 2)),
        ({"temperature": 1.0}, {"eos_token_id": 0}, (0, 2)),
        (None, {"text_config": {"eos_token_id": [1]}}, (1, 2)),
    ],
)
def test_ids_that_end_an_answer(
    folder: Path, generation_config: object, config: object, expected: tuple[int, ...]
) -> None:
    for name, value in (("generation_config.json", generation_config), ("config.json", config)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    assert Tokenizer.from_folder(folder).eos_token_ids == expected


def test_template_file_wins_over_the_config_and_that_over_the_legacy_file(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}))
    assert Tokenizer.from_folder(folder).render_chat([]) == "<|im_start|>assistant\n"
    (folder / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.from_folder(folder).render_chat([]) == "from its own file"
    change_config(folder, chat_template=None)
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(folder).render_chat([]) == "legacy"


def test_tools_choose_the_template_for_tools(folder: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    change_config(folder, chat_template=templates)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat(_CHAT) == "plain"
    assert tokenizer.render_chat(_CHAT, tools=[{"name": "clock"}]) == "clock"


def test_named_template_without_a_default_is_a_template_error(folder: Path) -> None:
    change_config(folder, chat_template=None)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.has_chat_template
    with pytest.raises(TemplateError, match="only templates named rag"):
        tokenizer.render_chat(_CHAT)


def test_model_without_a_template_says_what_to_do(sentencepiece: Tokenizer) -> None:
    assert not sentencepiece.has_chat_template
    with pytest.raises(TemplateError, match="no chat template; send a plain prompt"):
        sentencepiece.render_chat(_CHAT)


def test_fields_that_are_none_are_absent_and_special_tokens_have_names(folder: Path) -> None:
    change_config(folder, chat_template="{{ 'content' in messages[0] }} {{ eos_token }} {{ documents }} {{ flag }}")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat([{"role": "user", "content": None}], flag=3) == "False <|im_end|> None 3"


def test_lone_surrogate_is_the_callers_error(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        byte_level.encode("a\ud800b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: is missing"),
        ("tokenizer.json", b'{"version": ', "tokenizer.json: cannot be read as a tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: is not JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: holds a JSON list"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: is not JSON"),
        ("generation_config.json", b"3", "generation_config.json: holds a JSON int"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": "x"}}', "which is not a token"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "which is not a token"),
    ],
)
def test_bad_file_is_named(folder: Path, name: str, content: bytes | None, message: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


def test_odd_values_in_the_config_are_as_if_absent(tmp_path: Path) -> None:
    folder = write_byte_level(tmp_path)
    change_config(folder, bos_token={"no": "content"}, eos_token=3, pad_token="", chat_template=7)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.has_chat_template) == (None, (), False)
