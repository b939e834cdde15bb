"""From the bytes of a request to a checked value: nothing unknown, nothing ignored."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from ..errors import RequestError, UnsupportedField

MAX_BODY_BYTES = 8 * 1024**2
"""Largest request body."""

Unsupported = Mapping[str, tuple[object, ...]]
"""Fields that the protocol knows and we do not implement, with the values that ask for nothing beyond what we do."""

ANY = (object(),)
"""For a field that by definition has no effect on the answer: every value is accepted."""

_Body = TypeVar("_Body", bound=msgspec.Struct)
_FIELD_PATH = re.compile(r" - at `\$\.?(.*)`$")


def parse_body(body: bytes, kind: type[_Body], unsupported: Unsupported) -> _Body:
    """Decode JSON into `kind`; a null counts as absent.

    Raises:
        RequestError: Not JSON, not an object, an unknown field (with the nearest known one), or a wrong type.
        UnsupportedField: A field of `unsupported` with a value that would have an effect.
    """
    fields = {name: value for name, value in _decode_object(body).items() if value is not None}
    for name in list(fields):
        if name in kind.__struct_fields__:
            continue
        if name not in unsupported:
            raise _unknown_field(name, [*kind.__struct_fields__, *unsupported])
        _require_neutral(name, fields.pop(name), unsupported[name])
    try:
        return msgspec.convert(fields, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error


def _decode_object(body: bytes) -> dict[str, object]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {type(value).__name__}, but it must be an object")
    return value


def _unknown_field(name: str, known: list[str]) -> RequestError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return RequestError(f"unknown field {name[:100]!r}{hint}", param=name[:100])


def _require_neutral(name: str, value: object, neutral: tuple[object, ...]) -> None:
    if neutral is ANY or any(type(value) is type(allowed) and value == allowed for allowed in neutral):
        return
    allowed = ", ".join(repr(one) for one in neutral)
    hint = f"leave it out or send {allowed}" if allowed else "leave it out"
    raise UnsupportedField(f"{name} is not supported by this server; {hint}", param=name)


def _invalid(error: msgspec.ValidationError) -> RequestError:
    text = str(error)
    match = _FIELD_PATH.search(text)
    param = match[1] if match else None
    return RequestError(f"invalid body: {text}", param=param)
