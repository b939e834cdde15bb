"""What the catalog knows about one model, as it lies on disk."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import StoreError

FORMAT_VERSION = 1
"""Version of the record's fields; a record of another version is not read."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a model as it was when the model was pulled."""

    path: str
    """Relative to the model's folder."""
    num_bytes: int
    sha256: str
    """Hexadecimal."""


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the catalog."""

    format_version: int = FORMAT_VERSION
    name: str
    source: str
    """The reference it was pulled by, aliases resolved."""
    revision: str | None = None
    """Commit of a hub repository, version of a distribution."""
    folder: str
    """Holds `config.json`, `tokenizer.json` and the safetensors files; in the store, the hub's cache or the user's."""
    files: list[FileRecord]
    num_bytes: int
    """Sum over the files."""
    model_type: str
    dtype: str
    max_position_embeddings: int
    num_parameters: int
    """Elements of all tensors in the files, without scales of quantised ones."""
    created_unix_s: float
    """When the pull began to read the source."""
    quantization: str | None = None
    """How weights are stored where it is not `dtype`: `fp8`, or as the source had them, such as `Q4_1`."""
    is_quantized_copy: bool = False
    """The pull quantised the source's weights; its source's name alone then means the model as it was."""
    aliases: list[str] = []
    """Other names that find this model."""

    @property
    def path(self) -> Path:
        """`folder` as a path."""
        return Path(self.folder)

    def is_called(self, text: str) -> bool:
        """Whether `text` is this model's name, source or one of its aliases."""
        if self.is_quantized_copy:
            return text == self.name
        return text == self.name or text == self.source or text in self.aliases

    def is_complete(self) -> bool:
        """Whether every file is there with its size; does not read them."""
        return all(find_size(self.path / file.path) == file.num_bytes for file in self.files)


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """What re-hashing a model's files found; paths are relative to its folder."""

    name: str
    ok: list[str]
    changed: list[str]
    missing: list[str]

    @property
    def is_ok(self) -> bool:
        """Whether every file is as it was pulled."""
        return not (self.changed or self.missing)


class _Version(msgspec.Struct):
    format_version: int


def encode_record(record: ModelRecord) -> bytes:
    """The record as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode_record(data: bytes, path: Path) -> ModelRecord:
    """The record in `data`, which was read from `path`; raises `StoreError` that names `path` and the remedy."""
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{path}: a record of version {version}, this flashtensors reads version {FORMAT_VERSION}; "
                "pull the model again with the version you use"
            )
        return msgspec.json.decode(data, type=ModelRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged_record(path, str(error)) from error


def damaged_record(path: Path, problem: str) -> StoreError:
    """The error for a record file that cannot be used."""
    return StoreError(f"{path}: not a readable record: {problem}; remove this file and pull the model again")


def find_size(path: Path) -> int | None:
    """Bytes of a file; None when it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return None
