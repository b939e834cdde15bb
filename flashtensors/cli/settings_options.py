"""Command line flags made from the fields of `Settings`, so that the two cannot drift."""

from __future__ import annotations

import ast
import inspect
import itertools
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .. import config
from ..config import Settings, load_settings

_SECOND_NAMES = {"enforce_eager": ["eager"]}
"""Flags besides that of the field's own name."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def settings_options(function: _Function) -> _Function:
    """Add one option for each setting; the function gets those that were given, by field name."""
    texts = field_docstrings()
    kinds = typing.get_type_hints(Settings)
    for name in reversed(Settings.__struct_fields__):
        if name == "storage_path":
            continue  # an option of `flash` itself
        flags = [name.replace("_", "-"), *_SECOND_NAMES.get(name, [])]
        is_switch = kinds[name] is bool
        function = click.option(
            *(f"--{flag}/--no-{flag}" if is_switch else f"--{flag}" for flag in flags),
            name,
            default=None,
            type=bool if is_switch else str,
            metavar=None if is_switch else _metavar(kinds[name]),
            help=texts[name],
        )(function)
    return function


def field_docstrings() -> dict[str, str]:
    """The text under each field of `Settings`, read from its source: Python does not keep it."""
    tree = ast.parse(inspect.getsource(config))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings").body
    texts: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant), "a field of Settings is followed by its docstring"
            texts[field.target.id] = " ".join(str(text.value.value).replace("`", "").split())
    return texts


def settings_of(ctx: click.Context, **overrides: object) -> Settings:
    """The settings of this command: its flags, then environment, file and defaults."""
    return load_settings({**ctx.obj, **overrides})


def _metavar(kind: object) -> str:
    if isinstance(kind, types.UnionType):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    return {int: "NUMBER", float: "NUMBER", str: "TEXT"}.get(kind, "VALUE") if isinstance(kind, type) else "VALUE"
