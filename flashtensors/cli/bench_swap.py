"""`flash bench swap`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from ..checkpoint.catalog import Catalog
from ..checkpoint.record import ModelRecord
from ..config import Settings
from ..server.client import DaemonClient
from .bench_load import floor_seconds, measure_limits_of
from .output import print_json, print_table, size_text
from .settings_options import settings_of
from .timed_requests import TimedClient, percentile

if TYPE_CHECKING:
    from ..worker.load_trials import MachineLimits

_Metrics = Mapping[str, Mapping[tuple[str, ...], float]]


class Swap(msgspec.Struct, frozen=True, kw_only=True):
    """One load in its turn, beside what this machine can do."""

    bytes_by_tier: dict[str, int]
    """What it moved from `host memory`, `page cache` and `disk`."""
    seconds: float
    """From the wish to the last byte."""
    floor_s: float | None
    """What no load of these bytes can beat; None: a limit could not be measured."""
    times_floor: float | None
    over_floor_s: float | None
    first_token_s: float
    phase_seconds: dict[str, float]
    """`first_token`, from ready to the first token, overlaps with what is still on its way."""


class SwapReport(msgspec.Struct, frozen=True, kw_only=True):
    """One model's turns."""

    model: str
    num_swaps: int
    """Turns in which it had to be loaded."""
    first_token_p50_s: float
    first_token_max_s: float
    limits: MachineLimits
    swaps: list[Swap]


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
    """Ask FIRST and SECOND in turns, each time unloading the other, and time loads and first tokens.

    Each load is held against its floor: its bytes at the best rate that this machine has from where they were. The
    first turn of each, which may read from disk, is not counted. Starts the daemon when none runs.
    """
    settings = settings_of(ctx)
    catalog = Catalog(settings.store)
    records = [catalog.get(name) for name in (first, second)]
    if records[0].name == records[1].name:
        raise click.UsageError("name two different models")
    limits = measure_limits_of(settings, records)
    client = DaemonClient.connect_or_start(settings)
    reports = asyncio.run(_run(client, settings, records, limits, rounds, prompt, keeps_other=keep))
    if as_json:
        print_json(reports)
    else:
        print_swaps(reports)


def print_swaps(reports: Sequence[SwapReport]) -> None:
    """One line for each swap, then one for each model."""
    rows = [(report.model, *_swap_cells(swap)) for report in reports for swap in report.swaps]
    if rows:
        print_table(("MODEL", "BYTES", "FROM", "FLOOR", "TIME", "OVER", "FIRST TOKEN", "PHASES"), rows)
        click.echo()
    totals = [
        (
            report.model,
            str(report.num_swaps),
            f"{report.first_token_p50_s * 1000:.0f} ms",
            f"{report.first_token_max_s * 1000:.0f} ms",
            *_median_cells(report.swaps),
        )
        for report in reports
    ]
    print_table(("MODEL", "SWAPS", "FIRST TOKEN", "WORST", "FLOOR", "TIME", "OVER"), totals)


def _swap_cells(swap: Swap) -> tuple[str, ...]:
    sources = {tier: count for tier, count in swap.bytes_by_tier.items() if count}
    parts = (tier if len(sources) == 1 else f"{size_text(count)} {tier}" for tier, count in sources.items())
    return (
        size_text(sum(sources.values())),
        ", ".join(parts),
        *_floor_cells(swap),
        f"{swap.first_token_s * 1000:.0f} ms",
        ", ".join(f"{phase} {seconds * 1000:.0f} ms" for phase, seconds in swap.phase_seconds.items()),
    )


def _floor_cells(swap: Swap) -> tuple[str, str, str]:
    time_text = f"{swap.seconds * 1000:.0f} ms"
    if swap.floor_s is None or swap.times_floor is None or swap.over_floor_s is None:
        return "unknown", time_text, ""
    return f"{swap.floor_s * 1000:.0f} ms", time_text, f"{swap.times_floor:.2f}x, {swap.over_floor_s * 1000:+.0f} ms"


def _median_cells(swaps: Sequence[Swap]) -> tuple[str, ...]:
    """Those of the swap that took the median time."""
    ordered = sorted(swaps, key=lambda swap: swap.seconds)
    return _floor_cells(ordered[len(ordered) // 2]) if ordered else ("", "", "")


async def _run(
    client: DaemonClient,
    settings: Settings,
    records: Sequence[ModelRecord],
    limits: Mapping[str, MachineLimits],
    rounds: int,
    prompt: str,
    *,
    keeps_other: bool,
) -> list[SwapReport]:
    from ..worker.load_trials import cached_share  # brings torch

    waits: dict[str, list[float]] = {record.name: [] for record in records}
    swaps: dict[str, list[Swap]] = {record.name: [] for record in records}
    async with TimedClient(client.info, settings, num_at_once=1) as http:
        for turn in range(2 * rounds + 2):
            record, other = records[turn % 2], records[(turn + 1) % 2]
            if not keeps_other:
                unload = {"model": other.name, "keep_alive": 0, "stream": False}
                await asyncio.to_thread(client.post, "/api/generate", unload)
            share = cached_share(record.path)
            before = await http.metrics()
            body = {"model": record.name, "prompt": prompt, "max_tokens": 1, "ignore_eos": True}
            first_token_s = (await http.answer(body)).first_token_s
            # All bytes are there when a load is answered; the first token may come before them.
            await asyncio.to_thread(client.post, "/api/load", {"model": record.name, "stream": False})
            if keeps_other:
                await http.answer(body)  # a model that was loaded by command is not evicted before it has served
            if turn < 2:
                continue
            waits[record.name].append(first_token_s)
            after = await http.metrics()
            swap = find_swap(record.name, before, after, first_token_s, limits[record.name], share)
            swaps[record.name] += [] if swap is None else [swap]
    return [
        SwapReport(
            model=name,
            num_swaps=len(swaps[name]),
            first_token_p50_s=percentile(waits[name], 0.5),
            first_token_max_s=max(waits[name]),
            limits=limits[name],
            swaps=swaps[name],
        )
        for name in waits
    ]


def find_swap(
    model: str,
    before: _Metrics,
    after: _Metrics,
    first_token_s: float,
    limits: MachineLimits,
    cached_share: float | None,
) -> Swap | None:
    """The load of a model between two states of the metrics; None: there was none.

    Args:
        model: Its name.
        before: When the turn began.
        after: When all bytes were there.
        first_token_s: What the client waited for.
        limits: Of this machine.
        cached_share: Of the model's files, what the page cache held before; None: nobody knows.
    """
    if not sum(_changes("flashtensors_model_loads_total", model, before, after).values()):
        return None
    sources = _changes("flashtensors_model_load_bytes_total", model, before, after)
    cached_bytes = round(sources.get("disk", 0.0) * (cached_share or 0.0))
    bytes_by_tier = {
        "host memory": round(sources.get("host", 0.0)),
        "page cache": cached_bytes,
        "disk": round(sources.get("disk", 0.0)) - cached_bytes,
    }
    phases = _changes("flashtensors_model_load_seconds_total", model, before, after)
    seconds = sum(phases.values()) - phases.get("first_token", 0.0)
    floor_s = floor_seconds(bytes_by_tier, limits)
    return Swap(
        bytes_by_tier=bytes_by_tier,
        seconds=seconds,
        floor_s=floor_s,
        times_floor=None if not floor_s else seconds / floor_s,
        over_floor_s=None if floor_s is None else seconds - floor_s,
        first_token_s=first_token_s,
        phase_seconds=phases,
    )


def _changes(name: str, model: str, before: _Metrics, after: _Metrics) -> dict[str, float]:
    """How much each sample of one model grew, by its other label (`model_name` sorts before it)."""
    old = before.get(name, {})
    return {
        "".join(labels[1:]): value - old.get(labels, 0.0)
        for labels, value in after.get(name, {}).items()
        if labels[0] == model and value != old.get(labels, 0.0)
    }
