"""`flash start`, `flash stop`, `flash status`."""

from __future__ import annotations

import time

import click

from ..config import parse_keep_alive
from ..errors import ConfigError
from ..server.client import DaemonClient
from ..server.launch import find_daemon, log_path, start_daemon, stop_daemon
from .main import EXIT_NO_DAEMON
from .output import note, print_json, size_text
from .settings_options import settings_of, settings_options


@click.command("start")
@settings_options
@click.pass_context
def start_command(ctx: click.Context, **flags: object) -> None:
    """Start the daemon.

    It runs on after this command, until flash stop. Each flag is a setting: it may also stand in the environment as
    FLASH_<NAME>, or in config.toml in the store.
    """
    if isinstance(text := flags.get("keep_alive_s"), str):
        flags["keep_alive_s"] = parse_keep_alive(text, 0.0)
    settings = settings_of(ctx, **flags)
    running = find_daemon(settings)
    if running is not None:
        raise ConfigError(f"a daemon runs already: pid {running.pid} at {running.url}; stop it with flash stop")
    info = start_daemon(settings)
    click.echo(f"daemon runs at {info.url} (pid {info.pid})")


@click.command("stop")
@click.pass_context
def stop_command(ctx: click.Context) -> None:
    """Stop the daemon once its requests are answered."""
    settings = settings_of(ctx)
    running = find_daemon(settings)
    if running is None:
        note("no daemon runs")
        return
    stop_daemon(settings)
    click.echo(f"daemon stopped (pid {running.pid})")


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def status_command(ctx: click.Context, as_json: bool) -> int:
    """Say whether a daemon runs, and how it is; exit code 3 when none does."""
    settings = settings_of(ctx)
    client = DaemonClient.find(settings)
    if client is None:
        if as_json:
            print_json({"is_running": False})
        else:
            click.echo("no daemon runs")
        return EXIT_NO_DAEMON
    info, state = client.info, client.get("/api/ps")
    if as_json:
        print_json({"is_running": True, "daemon": info, "log": str(log_path(settings.store)), **state})
        return 0
    worker, models = state["worker"], state["models"]
    assert isinstance(worker, dict), "the daemon's own shape"
    assert isinstance(models, list), "the daemon's own shape"
    click.echo(f"daemon {info.version} at {info.url}, pid {info.pid}, up {time.time() - info.started_unix_s:.0f} s")
    device = f" on {worker['device']} ({worker['device_name']})" if "device" in worker else ""
    free = f", {size_text(worker['free_bytes'])} free" if "free_bytes" in worker else ""
    click.echo(f"worker {worker['state']}{device}{free}, {worker['num_restarts']} restarts")
    names = ", ".join(model["name"] for model in models) or "none"
    click.echo(f"models on the device: {names}")
    click.echo(f"log {log_path(settings.store)}")
    return 0
