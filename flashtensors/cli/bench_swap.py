"""`flash bench swap`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import click
import msgspec

from ..checkpoint.catalog import Catalog
from ..config import Settings
from ..server.client import DaemonClient
from .output import print_json, print_table, size_text
from .settings_options import settings_of
from .timed_requests import TimedClient, percentile

_Metrics = Mapping[str, Mapping[tuple[str, ...], float]]


class SwapReport(msgspec.Struct, frozen=True, kw_only=True):
    """One model's turns."""

    model: str
    num_swaps: int
    """Turns in which it had to be loaded."""
    first_token_p50_s: float
    first_token_max_s: float
    bytes_by_source: dict[str, int]
    """Bytes of one load, by the tier they came from, on average."""
    phase_seconds: dict[str, float]
    """Seconds of one load by phase, on average; phases may overlap."""


@click.command("swap")
@click.argument("first")
@click.argument("second")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Turns of each model.")
@click.option("--prompt", default="The capital of France is", show_default=True, help="What both are asked.")
@click.option("--keep", is_flag=True, help="Leave the other model where it is, if both fit: no swap then.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def swap_command(
    ctx: click.Context, first: str, second: str, rounds: int, prompt: str, keep: bool, as_json: bool
) -> None:
    """Ask FIRST and SECOND in turns, each time unloading the other, and time the first token.

    The first turn of each, which may read from disk, is not counted. Starts the daemon when none runs.
    """
    settings = settings_of(ctx)
    catalog = Catalog(settings.store)
    names = [catalog.get(name).name for name in (first, second)]
    if names[0] == names[1]:
        raise click.UsageError("name two different models")
    client = DaemonClient.connect_or_start(settings)
    reports = asyncio.run(_run(client, settings, names, rounds, prompt, keeps_other=keep))
    if as_json:
        print_json(reports)
        return
    rows = [
        (
            report.model,
            str(report.num_swaps),
            f"{report.first_token_p50_s * 1000:.0f} ms",
            f"{report.first_token_max_s * 1000:.0f} ms",
            ", ".join(f"{size_text(count)} {tier}" for tier, count in report.bytes_by_source.items() if count) or "-",
            ", ".join(f"{phase} {seconds * 1000:.0f} ms" for phase, seconds in report.phase_seconds.items()) or "-",
        )
        for report in reports
    ]
    print_table(("MODEL", "SWAPS", "FIRST TOKEN", "WORST", "BYTES FROM", "PHASES"), rows)


async def _run(
    client: DaemonClient, settings: Settings, names: list[str], rounds: int, prompt: str, *, keeps_other: bool
) -> list[SwapReport]:
    waits: dict[str, list[float]] = {name: [] for name in names}
    async with TimedClient(client.info, settings, num_at_once=1) as http:
        before: _Metrics = {}
        for turn in range(2 * rounds + 2):
            name, other = names[turn % 2], names[(turn + 1) % 2]
            if turn == 2:
                before = await _settled_metrics(client, http, other)
            if not keeps_other:
                unload = {"model": other, "keep_alive": 0, "stream": False}
                await asyncio.to_thread(client.post, "/api/generate", unload)
            body = {"model": name, "prompt": prompt, "max_tokens": 1, "ignore_eos": True}
            answer = await http.answer(body)
            if turn >= 2:
                waits[name].append(answer.first_token_s)
        after = await _settled_metrics(client, http, names[1])
    return [_report(name, waits[name], before, after) for name in names]


async def _settled_metrics(client: DaemonClient, http: TimedClient, name: str) -> _Metrics:
    """The metrics once all bytes of the last model are there: its first token may come before them."""
    await asyncio.to_thread(client.post, "/api/load", {"model": name, "stream": False})
    return await http.metrics()


def _report(model: str, waits_s: list[float], before: _Metrics, after: _Metrics) -> SwapReport:
    num_swaps = round(sum(_changes("flashtensors_model_loads_total", model, before, after).values()))
    phases = _changes("flashtensors_model_load_seconds_total", model, before, after)
    sources = _changes("flashtensors_model_load_bytes_total", model, before, after)
    return SwapReport(
        model=model,
        num_swaps=num_swaps,
        first_token_p50_s=percentile(waits_s, 0.5),
        first_token_max_s=max(waits_s),
        bytes_by_source={source: round(count / max(1, num_swaps)) for source, count in sources.items()},
        phase_seconds={phase: seconds / max(1, num_swaps) for phase, seconds in phases.items()},
    )


def _changes(name: str, model: str, before: _Metrics, after: _Metrics) -> dict[str, float]:
    """How much each sample of one model grew, by its other label (`model_name` sorts before it)."""
    old = before.get(name, {})
    return {
        "".join(labels[1:]): value - old.get(labels, 0.0)
        for labels, value in after.get(name, {}).items()
        if labels[0] == model
    }
