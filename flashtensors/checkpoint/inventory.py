"""Which files of a folder make a model, and whether they do."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..errors import CheckpointError
from .architecture import ModelConfig, read_model_config
from .chunk_digests import ChunkHasher, ModelDigests, find_identity
from .digest import hash_files
from .durable import disk_errors, sync_folder
from .progress import Reporter
from .record import FileRecord
from .safetensors import Checkpoint, open_checkpoint

WEIGHT_PATTERN = "*.safetensors"
MODEL_PATTERNS = (WEIGHT_PATTERN, "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
"""Files that are taken from a source; nothing that could be executed is among them."""
DUPLICATE_PATTERNS = ("*/*", "consolidated*", "*.fp16.safetensors", "*.fp32.safetensors", "adapter_*", "training_*")
"""Files that are not: second copies of the weights, and what lies in subfolders."""


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was found whole in a folder."""

    files: list[FileRecord]
    config: ModelConfig
    num_parameters: int
    digests: ModelDigests
    """Of the chunks of its weights."""


def is_model_file(name: str) -> bool:
    """Whether a file of that name, relative to the model's folder, is taken from a source."""
    return _matches(name, MODEL_PATTERNS) and not _matches(name, DUPLICATE_PATTERNS)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def take_inventory(folder: Path, reporter: Reporter, *, is_synced: bool) -> Inventory:
    """Check that `folder` holds a model that can run, and hash its files.

    Args:
        folder: In Hugging Face layout.
        reporter: Told about the hashing.
        is_synced: Make the files durable too.

    Raises:
        CheckpointError: A file is missing, damaged, or of a kind that is not supported; the message names it.
        StoreError: A file cannot be read.
    """
    config = read_model_config(folder)
    checkpoint = open_checkpoint(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json; save it there with a fast tokenizer of transformers, or pull a copy "
            "that has one"
        )
    names = _list_files(folder, checkpoint)
    paths = [folder / name for name in names]
    with disk_errors(folder):
        sizes = [path.stat().st_size for path in paths]
    reporter.begin("verifying", total_bytes=sum(sizes))
    chunks = {path: ChunkHasher() for path in {entry.path for entry in checkpoint.tensors.values()}}
    pieces = {path: hasher.update for path, hasher in chunks.items()}
    digests = hash_files(paths, reporter.advance, on_pieces=pieces, is_synced=is_synced)
    if is_synced:
        with disk_errors(folder):
            sync_folder(folder)
    files = [
        FileRecord(path=name, num_bytes=size, sha256=digest)
        for name, size, digest in zip(names, sizes, digests, strict=True)
    ]
    return Inventory(
        files=files,
        config=config,
        num_parameters=_count_parameters(checkpoint, config),
        digests=_collect_digests(chunks),
    )


def _collect_digests(chunks: Mapping[Path, ChunkHasher]) -> ModelDigests:
    with disk_errors(next(iter(chunks)).parent):
        states = {path: path.stat() for path in chunks}
    return ModelDigests(
        identity=find_identity((path.name, state.st_size, state.st_mtime_ns) for path, state in states.items()),
        files={path.name: hasher.digests() for path, hasher in chunks.items()},
    )


def _list_files(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Names of the checkpoint's own weights and of the other model files beside them."""
    weights = {entry.path.name for entry in checkpoint.tensors.values()}
    with disk_errors(folder):
        others = {
            path.name
            for path in folder.iterdir()
            if path.is_file() and is_model_file(path.name) and not path.match(WEIGHT_PATTERN)
        }
    return sorted(weights | others)


def _count_parameters(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Elements of all tensors but the scales of others."""
    scale = None if config.quantization is None else config.quantization.scale_name
    kinds = ((name.rpartition(".")[2], entry) for name, entry in checkpoint.tensors.items())
    return sum(math.prod(entry.shape) for kind, entry in kinds if kind != scale)
