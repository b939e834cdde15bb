"""What the small files beside `tokenizer.json` say: special tokens, end-of-sequence ids and chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ..errors import CheckpointError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one model's tokenizer, as transformers would read them."""

    added_tokens: dict[int, AddedToken] = field(default_factory=dict)
    """`added_tokens_decoder` of `tokenizer_config.json`: what older files keep outside `tokenizer.json`."""
    named_tokens: dict[str, AddedToken] = field(default_factory=dict)
    """`bos_token`, `eos_token` and so on; templates see them by these names."""
    extra_special_tokens: list[AddedToken] = field(default_factory=list)
    """Special tokens without a name."""
    eos_token_ids: tuple[int, ...] = ()
    """From `generation_config.json` where it has them, else from `config.json`."""
    chat_templates: dict[str, str] = field(default_factory=dict)
    """Template sources by name; the usual one is `default`."""
    adds_bos: bool = False
    """`add_bos_token` of `tokenizer_config.json`: counts where `tokenizer.json` has no post-processor."""
    adds_eos: bool = False
    """`add_eos_token`, likewise."""
    splits_special_tokens: bool = False
    """Text that looks like a special token is encoded as text."""


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the files beside `tokenizer.json`, each of which may be absent; `CheckpointError` for a malformed one."""
    config = _read_json(folder / "tokenizer_config.json")
    special_map = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
    values = config | special_map
    where = str(folder / "tokenizer_config.json")
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        values |= extra
        extra = []
    return TokenizerFiles(
        added_tokens=dict(_added_tokens(config, where)),
        named_tokens=dict(_named_tokens(values)),
        extra_special_tokens=[token for value in extra if (token := _special_token(value)) is not None],
        eos_token_ids=_eos_token_ids(folder),
        chat_templates=dict(_chat_templates(folder, config)),
        adds_bos=config.get("add_bos_token") is True,
        adds_eos=config.get("add_eos_token") is True,
        splits_special_tokens=config.get("split_special_tokens") is True,
    )


def _added_tokens(config: dict[str, Any], where: str) -> Iterator[tuple[int, AddedToken]]:
    for token_id, value in sorted(_items(config.get("added_tokens_decoder"))):
        token = _token(value)
        if token is None or not token_id.isdecimal():
            raise CheckpointError(f"{where}: added_tokens_decoder[{token_id!r}] is {value!r}, which is not a token")
        yield int(token_id), token


def _named_tokens(values: dict[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    others = [name for name in values if name.endswith("_token") and name not in _NAMED_TOKENS]
    for name in (*_NAMED_TOKENS, *others):
        token = _special_token(values.get(name))
        if token is not None:
            yield name, token


def _special_token(value: object) -> AddedToken | None:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False) if value else None
    token = _token(value)
    if token is not None:
        token.special = True
    return token


def _token(value: object) -> AddedToken | None:
    match value:
        case {"content": str(content), **fields} if content:
            flags = {name: fields[name] for name in _TOKEN_FLAGS if isinstance(fields.get(name), bool)}
            return AddedToken(content, **flags)
        case _:
            return None


def _eos_token_ids(folder: Path) -> tuple[int, ...]:
    config = _read_json(folder / "config.json")
    sources = (_read_json(folder / "generation_config.json"), config, dict(_items(config.get("text_config"))))
    for source in sources:
        match source.get("eos_token_id"):
            case int(token_id):
                return (token_id,)
            case [int(), *_] as token_ids:
                return tuple(token_id for token_id in token_ids if isinstance(token_id, int))
    return ()


def _chat_templates(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Templates by name; where several files have one of a name, the one that transformers would take comes last."""
    for source in (_read_json(folder / "chat_template.json").get("chat_template"), config.get("chat_template")):
        match source:
            case str(template):
                yield "default", template
            case [*entries]:
                for entry in entries:
                    match entry:
                        case {"name": str(name), "template": str(template)}:
                            yield name, template
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield path.stem, _read_text(path)
    path = folder / "chat_template.jinja"
    if path.is_file():
        yield "default", _read_text(path)


def _items(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}; pull the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, but an object is expected")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
