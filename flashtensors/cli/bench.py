"""`flash bench`: what this machine reaches with your own models."""

from __future__ import annotations

import click

from .lazy_group import LazyGroup

_COMMANDS = {
    "throughput": ("bench_throughput", "Tokens a second for many prompts at once."),
    "load": ("bench_load", "How fast a model's bytes reach the device, beside what this machine can do."),
    "swap": ("bench_swap", "From a request to its first token when two models take turns."),
}


@click.group("bench", cls=LazyGroup, commands=_COMMANDS)
def bench_command() -> None:
    """Measure what this machine reaches with your own models."""
