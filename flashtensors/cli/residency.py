"""`flash ps`, `flash load`, `flash unload`: the models on the device."""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import click

from ..errors import DaemonError
from ..server.client import DaemonClient
from .output import ProgressDisplay, note, print_json, print_table, size_text
from .settings_options import settings_of


@click.command("ps")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def ps_command(ctx: click.Context, as_json: bool) -> None:
    """List the models on the device."""
    state: dict[str, Any] = DaemonClient.connect(settings_of(ctx)).get("/api/ps")
    if as_json:
        print_json(state)
        return
    device = state["worker"].get("device", "?")
    rows = [
        (
            model["name"],
            "ready",
            device,
            size_text(model["weight_bytes"]),
            size_text(model["kv_cache_bytes"]),
            str(model.get("num_running", 0)),
            str(model.get("num_waiting", 0)),
            "pinned" if model.get("is_pinned") else until_text(model["expires_at"]),
        )
        for model in state["models"]
    ]
    rows += [
        (one["model"], "loading", device, size_text(one["total"]), "", "", "", f"{_percent(one)} {one['phase']}")
        for one in state["loading"]
    ]
    print_table(("NAME", "STATE", "DEVICE", "WEIGHTS", "KV CACHE", "RUNNING", "WAITING", "UNTIL"), rows)


@click.command("load")
@click.argument("model")
@click.option("--keep-alive", metavar="TIME", help="How long it stays when idle: 10m, 3600, -1 for ever.")
@click.option("--pin", is_flag=True, help="Never evict it to make room for another.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def load_command(ctx: click.Context, model: str, keep_alive: str | None, pin: bool, as_json: bool) -> None:
    """Bring a model onto the device; starts the daemon when none runs."""
    client = DaemonClient.connect_or_start(settings_of(ctx))
    body = {"model": model, "is_pinned": pin} | ({} if keep_alive is None else {"keep_alive": keep_alive})
    last: dict[str, Any] = {}
    with ProgressDisplay() as display, contextlib.closing(client.stream("/api/load", body)) as lines:
        for last in lines:
            if last["status"] != "success":
                display.update(f"{model}: {last['status']}", last["completed"], last["total"])
    if last.get("status") != "success":
        raise DaemonError(f"the daemon ended before {model} was loaded; see its log")
    if as_json:
        print_json(last)
    elif last["was_loaded"]:
        click.echo(f"{model} was loaded already")
    else:
        seconds = last["load_duration"] / 1e9
        click.echo(f"loaded {model}: {size_text(last['size'])} in {seconds:.2f} s")


@click.command("unload")
@click.argument("models", nargs=-1)
@click.option("--all", "is_all", is_flag=True, help="Every model on the device.")
@click.pass_context
def unload_command(ctx: click.Context, models: tuple[str, ...], is_all: bool) -> None:
    """Take models off the device, once their running requests have ended."""
    if bool(models) == is_all:
        raise click.UsageError("name the models, or say --all")
    client = DaemonClient.connect(settings_of(ctx))
    if is_all:
        state: dict[str, Any] = client.get("/api/ps")
        models = tuple(model["name"] for model in state["models"])
        if not models:
            note("no model is loaded")
    for model in models:
        client.post("/api/generate", {"model": model, "keep_alive": 0, "stream": False})
        click.echo(f"unloaded {model}")


def until_text(expires_at: str) -> str:
    """When an idle model leaves, as a distance."""
    left = datetime.datetime.fromisoformat(expires_at) - datetime.datetime.now(datetime.UTC)
    if left.days > 365:
        return "for ever"
    seconds = max(0, round(left.total_seconds()))
    return f"in {seconds} s" if seconds < 120 else f"in {seconds // 60} min"


def _percent(progress: dict[str, Any]) -> str:
    return f"{100 * progress['completed'] // progress['total']}%" if progress["total"] else ""
