"""`flash ps`, `flash load`, `flash unload`: the models on the device and in host memory."""

from __future__ import annotations

import contextlib
import datetime
from typing import Any

import click

from ..errors import DaemonError
from ..server.client import DaemonClient
from .output import ProgressDisplay, amount_text, note, print_json, print_table, rate_text, size_text
from .settings_options import settings_of


@click.command("ps")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def ps_command(ctx: click.Context, as_json: bool) -> None:
    """List the models on the device and in host memory."""
    state: dict[str, Any] = DaemonClient.connect(settings_of(ctx)).get("/api/ps")
    if as_json:
        print_json(state)
        return
    loading = {one["model"]: one for one in state["loading"]}
    rows = [_device_row(model, loading.pop(model["name"], None)) for model in state["models"]]
    rows += [_host_row(model, loading.pop(model["model"], None)) for model in state["host"]]
    rows += [
        (name, "loading", "disk", "", size_text(one["total"]), "", "", "", progress_text(one))
        for name, one in loading.items()
    ]
    head = ("NAME", "STATE", "TIER", "IN HOST", "WEIGHTS", "KV CACHE", "RUNNING", "WAITING", "UNTIL")
    print_table(head, rows)
    for line in _memory_lines(state["worker"]):
        note(line)


@click.command("load")
@click.argument("model")
@click.option("--keep-alive", metavar="TIME", help="How long it stays when idle: 10m, 3600, -1 for ever.")
@click.option("--pin", is_flag=True, help="Never evict it to make room for another.")
@click.option("--tier", type=click.Choice(["device", "host"]), default="device", help="Where to bring it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def load_command(ctx: click.Context, model: str, keep_alive: str | None, pin: bool, tier: str, as_json: bool) -> None:
    """Bring a model onto the device, or into host memory; starts the daemon when none runs."""
    if tier == "host" and (pin or keep_alive is not None):
        raise click.UsageError("--pin and --keep-alive are about the device; leave them out with --tier host")
    client = DaemonClient.connect_or_start(settings_of(ctx))
    body = {"model": model, "is_pinned": pin, "tier": tier} | ({} if keep_alive is None else {"keep_alive": keep_alive})
    last: dict[str, Any] = {}
    with ProgressDisplay() as display, contextlib.closing(client.stream("/api/load", body)) as lines:
        for last in lines:
            if last["status"] != "success":
                display.update(f"{model}: {last['status']}", last["completed"], last["total"], last.get("bytes_per_s"))
    if last.get("status") != "success":
        raise DaemonError(f"the daemon ended before {model} was loaded; see its log")
    if as_json:
        print_json(last)
    else:
        click.echo(_loaded_text(model, last))


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


def progress_text(progress: dict[str, Any]) -> str:
    """How far a load is: `read 1.2 GB of 16.4 GB, 3.1 GB/s`."""
    amount = amount_text(progress["completed"], progress["total"], progress.get("bytes_per_s"))
    return f"{progress['phase']} {amount}"


def share_text(num_bytes: int, total_bytes: int) -> str:
    """How much of a model is somewhere: `40%`, or nothing."""
    return f"{100 * num_bytes // total_bytes}%" if num_bytes and total_bytes else ""


def _device_row(model: dict[str, Any], progress: dict[str, Any] | None) -> tuple[str, ...]:
    until = "pinned" if model.get("is_pinned") else until_text(model["expires_at"])
    return (
        model["name"],
        model.get("state", "ready"),
        "device",
        share_text(model.get("host_bytes", 0), model.get("image_bytes", 0)),
        size_text(model["weight_bytes"]),
        size_text(model["kv_cache_bytes"]),
        str(model.get("num_running", 0)),
        str(model.get("num_waiting", 0)),
        until if progress is None else progress_text(progress),
    )


def _host_row(model: dict[str, Any], progress: dict[str, Any] | None) -> tuple[str, ...]:
    kept_bytes = model["kept_kv_bytes"]
    return (
        model["model"],
        "-" if model["state"] == "absent" else model["state"],
        model["tier"],
        share_text(model["host_bytes"], model["image_bytes"]),
        size_text(model["image_bytes"]) if model["image_bytes"] else "",
        f"{size_text(kept_bytes)} kept" if kept_bytes else "",
        "",
        str(model["num_parked"] or ""),
        "" if progress is None else progress_text(progress),
    )


def _memory_lines(worker: dict[str, Any]) -> list[str]:
    """What is free where, and how fast bytes came lately."""
    lines: list[str] = []
    if worker.get("free_bytes") is not None and worker.get("total_bytes"):
        device = worker.get("device_name") or worker["device"]
        lines.append(f"{device}: {size_text(worker['free_bytes'])} of {size_text(worker['total_bytes'])} free")
    if worker.get("host_bytes"):
        free_bytes = worker.get("host_free_bytes", 0)
        lines.append(f"host memory: {size_text(free_bytes)} of {size_text(worker['host_bytes'])} free")
        rates = {"host memory": worker.get("link_bytes_per_s"), "disk": worker.get("disk_bytes_per_s")}
        measured = [f"{rate_text(rate)} from {tier}" for tier, rate in rates.items() if rate is not None]
        if measured:
            lines.append(f"loads lately: {', '.join(measured)}")
    return lines


def _loaded_text(model: str, last: dict[str, Any]) -> str:
    if "image_bytes" in last:
        held, whole = size_text(last["host_bytes"]), size_text(last["image_bytes"])
        return f"{model}: {held} of {whole} are in host memory"
    if last["was_loaded"]:
        return f"{model} was loaded already"
    seconds = last["load_duration"] / 1e9
    speed = rate_text(last["size"] / max(seconds, 1e-9))
    return f"loaded {model}: {size_text(last['size'])} in {seconds:.2f} s ({speed})"
