"""`flash list`, `flash show`, `flash verify`, `flash rm`: the models on disk. None of them needs a daemon."""

from __future__ import annotations

import datetime

import click

from ..checkpoint.catalog import Catalog
from ..server.client import DaemonClient
from .output import print_json, print_table, size_text
from .settings_options import settings_of


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def list_command(ctx: click.Context, as_json: bool) -> None:
    """List the models in the store."""
    records = Catalog(settings_of(ctx).store).list()
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
            catalog.remove(catalog.get(model).name)
        click.echo(f"removed {model}")


def _day(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s).strftime("%Y-%m-%d %H:%M")
