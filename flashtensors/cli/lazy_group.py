"""Groups of commands whose modules are imported when a command is called: `--help` costs no import."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-liners without importing them.

    Args:
        commands: Module of this package and one-liner of each command, in the order of `--help`; command `name` is the
            module's `name_command`.
        aliases: Other names of commands.
        attributes: Of `click.Group`.
    """

    def __init__(
        self, *, commands: Mapping[str, tuple[str, str]], aliases: Mapping[str, str] | None = None, **attributes: Any
    ) -> None:
        super().__init__(**attributes)
        self._modules = commands
        self._aliases = aliases or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the table."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds a command."""
        name = self._aliases.get(cmd_name, cmd_name)
        if name not in self._modules:
            return None
        module = importlib.import_module(f".{self._modules[name][0]}", package=__package__)
        return getattr(module, f"{name}_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table as part of `--help`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._modules.items()])
