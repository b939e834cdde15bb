"""`flash completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    For bash: eval "$(flash completion bash)" in ~/.bashrc. For zsh the same in ~/.zshrc. For fish: flash completion
    fish > ~/.config/fish/completions/flash.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows every shell of the choice"
    click.echo(kind(ctx.find_root().command, {}, "flash", "_FLASH_COMPLETE").source())
