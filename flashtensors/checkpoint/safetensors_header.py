"""A strict reader of safetensors headers.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an optional `__metadata__`, then the data without holes.
What is accepted here the `safetensors` library accepts too; only the header is read, and nothing is allocated before
its length was checked against the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import msgspec

from ..errors import CheckpointError, HeaderError, TruncatedFile

MAX_HEADER_BYTES = 100_000_000
"""Longest header that the format allows."""

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of one element, by dtype as the format spells it."""

REPAIR = "the file is damaged, pull it again"
"""What a message about a bad file ends with."""


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of one tensor are."""

    name: str
    dtype: str
    """A key of `DTYPE_BITS`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """From the beginning of the file, in bytes."""
    num_bytes: int


def read_header(path: Path) -> list[TensorEntry]:
    """Tensors of one file, in the order of their bytes.

    Raises:
        HeaderError: The header does not parse, or its extents overlap, leave holes or do not fit their shapes.
        TruncatedFile: The file is shorter than it says.
        CheckpointError: The file cannot be opened, or is no regular file.
    """
    header, data_start, file_bytes = _read_json(path)
    header.pop("__metadata__", None)
    entries = [_parse_entry(path, name, fields, data_start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    end = data_start
    for entry in entries:
        if entry.offset != end:
            kind = "overlaps the tensor before it" if entry.offset < end else "leaves a hole before it"
            _fail(path, f"tensor {entry.name!r} {kind}: it starts at byte {entry.offset}, expected {end}")
        end += entry.num_bytes
    if file_bytes < end:
        last = entries[-1].name
        raise TruncatedFile(f"{path}: {file_bytes} bytes, but tensor {last!r} ends at byte {end}; {REPAIR}")
    if file_bytes > end:
        _fail(path, f"{file_bytes} bytes, but the last tensor ends at byte {end}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of one file; raises as `read_header`."""
    header, _, _ = _read_json(path)
    return header.get("__metadata__", {})


def _fail(path: Path, problem: str) -> NoReturn:
    raise HeaderError(f"{path}: {problem}; {REPAIR}")


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as checked JSON, the byte at which data starts, and the size of the file."""
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file; put the checkpoint's file there")
            raw = _read_raw(path, file, status.st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse_json(path, raw), 8 + len(raw), status.st_size


def _read_raw(path: Path, file: BinaryIO, file_bytes: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise TruncatedFile(f"{path}: {file_bytes} bytes, but a safetensors file has at least 10; {REPAIR}")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        _fail(path, f"header claims {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if 8 + header_bytes > file_bytes:
        raise TruncatedFile(f"{path}: {file_bytes} bytes, but the header alone needs {8 + header_bytes}; {REPAIR}")
    raw = file.read(header_bytes)
    if len(raw) < header_bytes:
        raise TruncatedFile(f"{path}: the file shrank while it was read; {REPAIR}")
    return raw


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        _fail(path, f"header starts with {raw[:1]!r}, expected b'{{'")
    try:
        text = raw.decode("utf-8")
        header = json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_int=_parse_size,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
        "".join(header).encode("utf-8")  # lone surrogates, which JSON escapes can spell, are no text
    except (ValueError, RecursionError) as error:
        _fail(path, f"header is not the JSON of the format: {error}")
    metadata = header.get("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _fail(path, "__metadata__ does not map text to text")
    return header


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return unique


def _parse_size(digits: str) -> int:
    if len(digits) > 19 or not digits.isdigit():
        raise ValueError(f"{digits[:32]} is not a size")
    return int(digits)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:32]} is not a size")


def _parse_entry(path: Path, name: str, fields: object, data_start: int) -> TensorEntry:
    if not (isinstance(fields, dict) and fields.keys() == {"dtype", "shape", "data_offsets"}):
        _fail(path, f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _fail(path, f"tensor {name!r} has dtype {dtype!r}, known are {', '.join(DTYPE_BITS)}")
    if not _is_sizes(shape):
        _fail(path, f"tensor {name!r} has shape {shape!r}, expected a list of sizes")
    if not (_is_sizes(offsets) and len(offsets) == 2):
        _fail(path, f"tensor {name!r} has data_offsets {offsets!r}, expected [begin, end]")
    begin, end = offsets
    num_bytes = find_num_bytes(dtype, shape)
    if num_bytes is None:
        _fail(path, f"tensor {name!r}: {dtype} {shape} is no whole number of bytes below 2^63")
    if end - begin != num_bytes:
        _fail(path, f"tensor {name!r} spans {end - begin} bytes, but {dtype} {shape} needs {num_bytes}")
    return TensorEntry(
        name=name, dtype=dtype, shape=tuple(shape), path=path, offset=data_start + begin, num_bytes=num_bytes
    )


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def find_num_bytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes of a tensor; None when that overflows 63 bits, or does not end on a byte."""
    num_elements = 1
    for size in shape:
        num_elements *= size
        if num_elements >= 2**63:
            return None
    num_bits = num_elements * DTYPE_BITS[dtype]
    return num_bits // 8 if num_bits < 2**63 and num_bits % 8 == 0 else None
