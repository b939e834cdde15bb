"""`flash bench load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from ..checkpoint.catalog import Catalog
from ..checkpoint.record import ModelRecord
from ..config import Settings
from ..server.client import DaemonClient
from .output import ProgressDisplay, note, print_json, print_table, size_text
from .settings_options import settings_of

if TYPE_CHECKING:
    from ..worker.load_trials import LoadTrial, MachineLimits


@click.command("load")
@click.argument("model")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Loads from each tier.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def load_command(ctx: click.Context, model: str, runs: int, as_json: bool) -> None:
    """Load MODEL from each tier, and show what was reached beside what this machine can do.

    It runs in this process, not in the daemon; where models of the daemon take the device's memory, unload them first.
    """
    settings = settings_of(ctx)
    record = Catalog(settings.store).get(model)
    limits = measure_limits_of(settings, [record])[record.name]
    from ..worker.load_trials import run_load_trials  # brings torch, which takes seconds

    with ProgressDisplay() as display:
        trials: list[LoadTrial] = []
        for trial in run_load_trials(settings, record.name, record.path, num_runs=runs):
            trials.append(trial)
            display.update(f"{record.name}: {trial.tier}")
    if as_json:
        print_json({"model": record.name, "limits": limits, "loads": trials})
    else:
        print_loads(trials, limits)


def measure_limits_of(settings: Settings, records: Sequence[ModelRecord]) -> dict[str, MachineLimits]:
    """Measure what this machine can do with the files of each model."""
    if DaemonClient.find(settings) is not None:
        note("a daemon runs: what it does at the same time, and the memory it holds, count here too")
    from ..worker.load_trials import measure_limits  # brings torch, which takes seconds

    with ProgressDisplay() as display:
        display.update("measuring this machine")
        return {record.name: measure_limits(settings, record.path) for record in records}


def print_loads(trials: list[LoadTrial], limits: MachineLimits) -> None:
    """One line for each tier: its median load."""
    rows: list[tuple[str, ...]] = []
    for tier in dict.fromkeys(trial.tier for trial in trials):
        own = sorted((trial for trial in trials if trial.tier == tier), key=lambda trial: trial.seconds)
        median = own[len(own) // 2]
        limit = limit_of(tier, limits)
        rows.append(
            (
                tier,
                size_text(median.num_bytes),
                f"{median.seconds:.3f} s",
                f"{median.bytes_per_s / 1e9:.2f} GB/s",
                "unknown" if limit is None else f"{limit / 1e9:.2f} GB/s",
                "" if limit is None else f"{median.bytes_per_s / limit:.0%}",
                median.reader,
                ", ".join(f"{phase} {seconds * 1000:.0f} ms" for phase, seconds in median.phase_seconds.items()),
            )
        )
    print_table(("FROM", "BYTES", "TIME", "REACHED", "LIMIT", "SHARE", "READER", "PHASES"), rows)


def limit_of(tier: str, limits: MachineLimits) -> float | None:
    """Bytes a second that no load from a tier can beat: the slower of reading and copying."""
    read = {"disk": limits.disk, "page cache": limits.page_cache}.get(tier, limits.copy)
    return None if read is None else min(read, limits.copy)


def floor_seconds(bytes_by_tier: Mapping[str, int], limits: MachineLimits) -> float | None:
    """Seconds that no load of these bytes can beat; reads from every tier, and copies, may go on at the same time."""
    seconds = sum(bytes_by_tier.values()) / limits.copy
    for tier, num_bytes in bytes_by_tier.items():
        limit = limit_of(tier, limits)
        if num_bytes and limit is None:
            return None
        seconds = max(seconds, num_bytes / limit if limit else 0.0)
    return seconds
