"""`flash`: the table of commands and what every one of them shares. A command's module is imported when it is called.

Exit codes: 0 success, 1 error, 2 wrong usage, 3 no daemon (none runs, or none could be started), 4 no such model,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback

import click

from ..errors import DaemonError, FlashError, ModelNotFound
from .lazy_group import LazyGroup

EXIT_ERROR, EXIT_USAGE, EXIT_NO_DAEMON, EXIT_NO_MODEL, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

_COMMANDS = {
    "run": ("run", "Ask a model, or chat with it."),
    "pull": ("pull", "Bring a model into the store."),
    "list": ("store", "List the models in the store."),
    "show": ("store", "Show a model's particulars."),
    "verify": ("store", "Hash a model's files again and compare."),
    "rm": ("store", "Remove models from the store."),
    "start": ("daemon", "Start the daemon."),
    "stop": ("daemon", "Stop the daemon once its requests are answered."),
    "status": ("daemon", "Say whether a daemon runs, and how it is."),
    "ps": ("residency", "List the models on the device."),
    "load": ("residency", "Bring a model onto the device."),
    "unload": ("residency", "Take models off the device."),
    "bench": ("bench", "Measure throughput, loads and swaps of your models."),
    "doctor": ("doctor", "Check this machine and installation."),
    "completion": ("completion", "Print a shell's completion script."),
}
_ALIASES = {"ls": "list"}


@click.group(
    cls=LazyGroup,
    commands=_COMMANDS,
    aliases=_ALIASES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 success, 1 error, 2 wrong usage, 3 no daemon, 4 no such model, 130 interrupted.",
)
@click.version_option(package_name="flashtensors", prog_name="flash")
@click.option("--storage-path", metavar="FOLDER", help="The store; otherwise FLASH_STORAGE_PATH or ~/.flashtensors.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def flash(ctx: click.Context, storage_path: str | None, debug: bool) -> None:
    """Serve many language models from one GPU, or from a CPU."""
    ctx.obj = {"storage_path": storage_path}


def main() -> None:
    """Run the command line and exit."""
    sys.exit(run_command_line(sys.argv[1:]))


def run_command_line(arguments: list[str]) -> int:
    """Run one command; an error becomes one line on standard error. Returns the exit code."""
    try:
        code = flash.main(arguments, prog_name="flash", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has left: no second complaint
        return EXIT_ERROR
    except Exception as error:  # the boundary: nobody but --debug wants a traceback
        return _report(error, wants_traceback="--debug" in arguments)


def _report(error: Exception, *, wants_traceback: bool) -> int:
    if wants_traceback:
        traceback.print_exception(error)
    if not isinstance(error, FlashError):
        click.echo(f"error: {type(error).__name__}: {error}; run with --debug for the traceback", err=True)
        return EXIT_ERROR
    click.echo(f"error: {error.message}", err=True)
    if isinstance(error, DaemonError):
        return EXIT_NO_DAEMON
    return EXIT_NO_MODEL if isinstance(error, ModelNotFound) else EXIT_ERROR


if __name__ == "__main__":
    main()
