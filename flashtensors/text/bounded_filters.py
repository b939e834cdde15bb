"""What chat templates call, where it may make much of little: each result is bounded before it is built.

Results are those of Jinja's and transformers' own functions, without autoescaping, which chat templates do not use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Protocol

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.filters import do_indent, make_attrgetter
from jinja2.utils import Namespace, pass_environment

from .render_budget import RenderBudget

_LARGE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(\d{4,}|\{)")
_LARGE_PERCENT = re.compile(r"%(\([^)]*\))?[-#0 +\d.]*(\d{4,}|\*)")
_MAX_JSON_INDENT = 16


class HasBudget(Protocol):
    """An environment that knows the budget of the rendering under way."""

    budget: ContextVar[RenderBudget]


@pass_environment
def join(environment: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """Jinja's `join` filter."""
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return str(d).join(environment.budget.get().gather(items, len(str(d))))


@pass_environment
def replace(environment: HasBudget, s: object, old: str, new: str, count: int | None = None) -> str:
    """Jinja's `replace` filter."""
    admit_replace(environment.budget.get(), str(s), old, new)
    return str(s).replace(old, new, -1 if count is None else count)


@pass_environment
def indent(environment: HasBudget, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's `indent` filter."""
    size = len(width) if isinstance(width, str) else width
    environment.budget.get().admit(len(s) + (len(s.splitlines()) + 1) * size)
    return do_indent(s, width, first, blank)


def to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson` filter: JSON as it is, not escaped for HTML."""
    sizes = [len(text) for text in (indent, *(separators or ())) if isinstance(text, str)]
    if max([*sizes, indent if isinstance(indent, int) else 0]) > _MAX_JSON_INDENT:
        raise SecurityError(f"tojson takes an indent and separators of at most {_MAX_JSON_INDENT} characters")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def admit_replace(budget: RenderBudget, text: str, old: str, new: str) -> None:
    """Refuse a replacement whose result would be too large."""
    budget.admit(len(text) + text.count(old) * len(new))


def admit_format(budget: RenderBudget, text: str, values: object) -> None:
    """Refuse `str.format` with widths that are large or computed, or with a result that would be too large."""
    _admit_fields(budget, text, _LARGE_FORMAT.search(text), text.count("{"), values)


def admit_percent(budget: RenderBudget, text: str, values: object) -> None:
    """Refuse `text % values` likewise."""
    _admit_fields(budget, text, _LARGE_PERCENT.search(text), text.count("%"), values)


def _admit_fields(
    budget: RenderBudget, text: str, large: re.Match[str] | None, num_fields: int, values: object
) -> None:
    if large is not None:
        raise SecurityError(f"format {large[0][:80]!r} has a width of four or more digits, or one that is computed")
    budget.admit(len(text) + num_fields * (1000 + budget.weigh(values)))


class PlainNamespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore and without its content when printed."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self`, so that a template may use the name
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


BOUNDED_FILTERS: dict[str, Callable[..., Any]] = {
    "indent": indent,
    "join": join,
    "replace": replace,
    "tojson": to_json,
}
"""Filters that take the place of Jinja's."""

CHAT_GLOBALS: dict[str, Callable[..., Any]] = {
    "dict": _make_dict,
    "namespace": PlainNamespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}
"""Functions that chat templates expect."""
