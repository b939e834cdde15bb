"""`flash list`, `flash show`, `flash verify`, `flash rm`: the models on disk. None of them needs a daemon."""

from __future__ import annotations

import datetime
import shlex

import click

from ..checkpoint.catalog import Catalog
from ..checkpoint.record import ModelRecord
from ..errors import DigestMismatch
from ..server.client import DaemonClient
from .output import ProgressDisplay, note, print_json, print_table, size_text
from .settings_options import settings_of


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def list_command(ctx: click.Context, as_json: bool) -> None:
    """List the models in the store."""
    catalog = Catalog(settings_of(ctx).store)
    records = catalog.list()
    for error in catalog.damaged():
        note(f"warning: {error.message}")
    if as_json:
        print_json(records)
        return
    rows = [
        (record.name, record.model_type, size_text(record.num_bytes), _day(record.created_unix_s), record.source)
        for record in records
    ]
    print_table(("NAME", "TYPE", "SIZE", "PULLED", "SOURCE"), rows)


@click.command("show")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def show_command(ctx: click.Context, model: str, as_json: bool) -> None:
    """Show a model's particulars."""
    record = Catalog(settings_of(ctx).store).get(model)
    if as_json:
        print_json(record)
        return
    lines = {
        "name": record.name,
        "aliases": ", ".join(record.aliases) or "none",
        "source": record.source,
        "revision": record.revision or "none",
        "type": record.model_type,
        "parameters": f"{record.num_parameters:,}",
        "dtype": record.dtype,
        "quantization": record.quantization or "none",
        "context": f"{record.max_position_embeddings:,} tokens",
        "size": size_text(record.num_bytes),
        "folder": record.folder,
        "pulled": _day(record.created_unix_s),
    }
    width = max(map(len, lines))
    for label, text in lines.items():
        click.echo(f"{label.ljust(width)}  {text}")
    for file in record.files:
        click.echo(f"{'file'.ljust(width)}  {file.path}  {size_text(file.num_bytes)}  sha256:{file.sha256}")


@click.command("verify")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify_command(ctx: click.Context, model: str, as_json: bool) -> None:
    """Hash a model's files again and compare with what was pulled; exit code 1 when they differ."""
    catalog = Catalog(settings_of(ctx).store)
    with ProgressDisplay() as display:
        report = catalog.verify(
            model, lambda progress: display.update(progress.status, progress.done_bytes, progress.total_bytes)
        )
    if as_json:
        print_json(report)
    else:
        for label, paths in (("ok", report.ok), ("changed", report.changed), ("missing", report.missing)):
            for path in paths:
                click.echo(f"{label:<7}  {path}")
    if not report.is_ok:
        num_bad, num_files = len(report.changed) + len(report.missing), len(report.ok)
        raise DigestMismatch(
            f"{num_bad} of {num_bad + num_files} files of {report.name} are not what was pulled; "
            f"{_pull_again(catalog.get(model))}"
        )


@click.command("rm")
@click.argument("models", nargs=-1, required=True)
@click.pass_context
def rm_command(ctx: click.Context, models: tuple[str, ...]) -> None:
    """Remove models from the store."""
    settings = settings_of(ctx)
    client, catalog = DaemonClient.find(settings), Catalog(settings.store)
    for model in models:
        if client is not None:
            client.delete("/api/delete", {"model": model})
        else:
            catalog.remove(model)
        click.echo(f"removed {model}")


def _pull_again(record: ModelRecord) -> str:
    """The command that replaces a model by what its source has now."""
    quantize = ["--quantize", record.quantization or ""] if record.is_quantized_copy else []
    return shlex.join(["flash", "pull", "--force", *quantize, record.source, "--name", record.name])


def _day(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M")
