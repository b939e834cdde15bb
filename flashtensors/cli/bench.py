"""`flash bench`: what this machine reaches with your own models. A subcommand's module is imported when called."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "throughput": "Tokens a second for many prompts at once.",
    "load": "How fast a model's bytes reach the device, beside what this machine can do.",
    "swap": "From a request to its first token when two models take turns.",
}


class LazyBenchGroup(click.Group):
    """A group that knows its commands' names and one-liners without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module that holds a command."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".bench_{cmd_name}", package=__package__)
        return getattr(module, f"{cmd_name}_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table as part of `--help`."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group("bench", cls=LazyBenchGroup)
def bench_command() -> None:
    """Measure what this machine reaches with your own models."""
