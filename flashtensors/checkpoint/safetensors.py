"""Safetensors checkpoints: the set of files that makes one, and a streaming writer."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from ..errors import CheckpointError
from .durable import disk_errors, sync_folder
from .safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, REPAIR, TensorEntry, find_num_bytes, read_header

SINGLE_FILE = "model.safetensors"
"""Name of the weights of a model in one file."""
INDEX_FILE = "model.safetensors.index.json"
"""Name of the list of shards of a model in several files."""

_DATA_ALIGNMENT = 4096

Chunk = bytes | bytearray | memoryview
TensorToWrite = tuple[str, str, tuple[int, ...], Chunk | Iterable[Chunk]]
"""`(name, dtype, shape, bytes)`; the bytes whole, or in pieces that are asked for when their turn comes."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """All tensors of a model, over all its files."""

    tensors: dict[str, TensorEntry]
    """By name; file after file, within a file in the order of bytes."""
    num_bytes: int
    """Sum over the tensors."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Tensors of the checkpoint in `folder`; every file's header is read and checked.

    The files are `model.safetensors`, or the shards of `model.safetensors.index.json`, or else all `*.safetensors`.
    Files may be links, as in the hub's cache.

    Raises:
        CheckpointError: No weights, a missing shard, an index that contradicts its shards, a tensor in two shards.
        HeaderError, TruncatedFile: As `read_header`.
    """
    weight_map: Mapping[str, str] = {}
    if (folder / SINGLE_FILE).exists():
        paths = [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).exists():
        weight_map = _read_weight_map(folder / INDEX_FILE)
        paths = [folder / shard for shard in sorted(set(weight_map.values()))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: no *.safetensors file; only safetensors and GGUF weights are read")
    tensors: dict[str, TensorEntry] = {}
    for path in paths:
        for entry in read_header(path):
            other = tensors.setdefault(entry.name, entry)
            if other is not entry:
                raise CheckpointError(
                    f"{folder}: tensor {entry.name!r} is in {other.path.name} and in {path.name}; "
                    "remove the file that does not belong to the model"
                )
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{folder / shard}: tensor {name!r} is not there, but {INDEX_FILE} says so; {REPAIR}")
    return Checkpoint(tensors=tensors, num_bytes=sum(entry.num_bytes for entry in tensors.values()))


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor to file name; every file exists beside the index."""
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error}; {REPAIR}") from error
    for shard in sorted(set(weight_map.values())):
        if any(char in shard for char in "/\\\0") or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map names {shard!r}, expected a *.safetensors file beside the index"
            )
        if not (index.parent / shard).exists():
            raise CheckpointError(
                f"{index.parent / shard}: this shard is missing, {index.name} names it; pull the model again"
            )
    return weight_map


def write_safetensors(path: Path, tensors: Iterable[TensorToWrite], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to `path`, one piece in memory at a time; `path` appears whole or not at all.

    Tensors of wider elements go first (stable), so that every tensor is aligned to its elements. The header is padded
    with spaces, as the format allows, so that data begins at a multiple of 4096 bytes: O_DIRECT reads start aligned.

    Raises:
        CheckpointError: A dtype or shape that the format does not know, a name twice, or data of another size.
        DiskFull: No room; nothing was kept.
        StoreError: Any other failure to write.
    """
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS.get(tensor[1], 0))
    header = _encode_header(path, ordered, metadata or {})
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with disk_errors(path):
            with open(temporary, "xb", buffering=0) as file:
                _write_all(file, header)
                for name, dtype, shape, data in ordered:
                    _write_tensor(path, file, name, find_num_bytes(dtype, shape), data)
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _encode_header(path: Path, tensors: list[TensorToWrite], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape, _ in tensors:
        num_bytes = find_num_bytes(dtype, shape) if dtype in DTYPE_BITS else None
        if num_bytes is None:
            raise CheckpointError(f"{path}: tensor {name!r} as {dtype} {tuple(shape)} cannot be stored as safetensors")
        if name in header or name == "__metadata__":
            raise CheckpointError(f"{path}: tensor name {name!r} is taken; give every tensor its own")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {len(text)} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return len(text).to_bytes(8, "little") + text


def _write_tensor(path: Path, file: BinaryIO, name: str, num_bytes: int | None, data: Chunk | Iterable[Chunk]) -> None:
    written = 0
    for chunk in [data] if isinstance(data, bytes | bytearray | memoryview) else data:
        view = memoryview(chunk).cast("B")
        _write_all(file, view)
        written += len(view)
    if written != num_bytes:
        raise CheckpointError(f"{path}: tensor {name!r} was given {written} bytes, expected {num_bytes}")


def _write_all(file: BinaryIO, data: Chunk) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
