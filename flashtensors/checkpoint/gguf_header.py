"""A strict reader of GGUF metadata and tensor tables.

Format: versions 2 and 3, little-endian, of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and
length is checked against the bytes that are left before anything of that size is allocated, and every tensor against
the file.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

import msgspec
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import CheckpointError, HeaderError, TruncatedFile

MAX_STRING_BYTES = 16 * 1024**2
"""Longest string that is read; the longest in the field are chat templates."""
MAX_ARRAY_ITEMS = 16 * 1024**2
"""Longest array that is read; the longest in the field are vocabularies and merges."""

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1024**2
_MIN_FIELD_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_QUANTIZATIONS = {quantization.value: quantization for quantization in GGML_QUANT_SIZES}

MetadataValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]


class GGUFTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of one tensor are."""

    name: str
    quantization: GGMLQuantizationType
    shape: tuple[int, ...]
    """Outermost dimension first, as in numpy and torch."""
    path: Path
    offset: int
    """From the beginning of the file, in bytes."""
    num_bytes: int


class GGUFHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a GGUF file says about itself."""

    path: Path
    metadata: dict[str, MetadataValue]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Metadata and tensor table of one file.

    Raises:
        HeaderError: The header lies, repeats a name, or uses what the format does not define.
        TruncatedFile: The file ends before the bytes its header promises.
        CheckpointError: The file cannot be opened, or is no regular file.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=1024**2) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is not a regular file; put the GGUF file there")
            return _HeaderReader(path, file, status.st_size).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _HeaderReader:
    """A cursor over the header that never asks for more than the file holds."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self._path = path
        self._file = file
        self._file_bytes = file_bytes
        self._position = 0

    def read(self) -> GGUFHeader:
        self._read_magic()
        num_tensors, num_fields = struct.unpack("<QQ", self._take(16, "counts"))
        self._check_count(num_fields, _MIN_FIELD_BYTES, "metadata fields")
        metadata: dict[str, MetadataValue] = {}
        for _ in range(num_fields):
            key = self._read_string("a metadata key")
            if key in metadata:
                self._fail(f"metadata key {key!r} occurs twice")
            metadata[key] = self._read_value(self._read_u32(key), key)
        self._check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors")
        infos = [self._read_tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            self._fail(f"general.alignment is {alignment!r}, expected a power of two up to {_MAX_ALIGNMENT}")
        data_start = self._position + -self._position % alignment
        tensors = [self._place_tensor(*info, data_start, alignment) for info in infos]
        self._check_layout(tensors)
        return GGUFHeader(path=self._path, metadata=metadata, tensors={tensor.name: tensor for tensor in tensors})

    def _read_magic(self) -> None:
        magic = self._take(4, "magic")
        if magic != b"GGUF":
            self._fail(f"the file begins with {magic!r}, expected b'GGUF'")
        version = self._read_u32("version")
        if version not in (2, 3):
            kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
            self._fail(f"{kind} is not supported, little-endian versions 2 and 3 are")

    def _read_value(self, value_type: int, key: str) -> MetadataValue:
        if value_type == _STRING:
            return self._read_string(key)
        if value_type == _ARRAY:
            return self._read_array(key)
        return self._read_scalars(value_type, 1, key)[0]

    def _read_array(self, key: str) -> list[int] | list[float] | list[bool] | list[str]:
        item_type, num_items = struct.unpack("<IQ", self._take(12, key))
        if num_items > MAX_ARRAY_ITEMS:
            self._fail(f"metadata {key!r} has {num_items} items, at most {MAX_ARRAY_ITEMS} are allowed")
        if item_type == _STRING:
            self._check_count(num_items, 8, f"strings in metadata {key!r}")
            return [self._read_string(key) for _ in range(num_items)]
        return self._read_scalars(item_type, num_items, key)

    def _read_scalars(self, value_type: int, count: int, key: str) -> list[int] | list[float] | list[bool]:
        if value_type not in _SCALARS:
            self._fail(f"metadata {key!r} has value type {value_type}, which the format does not define here")
        dtype = np.dtype(_SCALARS[value_type])
        values = np.frombuffer(self._take(count * dtype.itemsize, key), dtype).tolist()
        if value_type != _BOOL:
            return values
        if any(value > 1 for value in values):
            self._fail(f"metadata {key!r} has a boolean that is neither 0 nor 1")
        return [bool(value) for value in values]

    def _read_tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, quantisation and offset, as the table says them."""
        name = self._read_string("a tensor name")
        num_dimensions = self._read_u32(name)
        if not 0 < num_dimensions <= _MAX_DIMENSIONS:
            self._fail(f"tensor {name!r} has {num_dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        *dimensions, quantization, offset = struct.unpack(
            f"<{num_dimensions}QIQ", self._take(8 * num_dimensions + 12, name)
        )
        return name, tuple(reversed(dimensions)), quantization, offset

    def _place_tensor(
        self, name: str, shape: tuple[int, ...], quantization: int, offset: int, data_start: int, alignment: int
    ) -> GGUFTensor:
        if quantization not in _QUANTIZATIONS:
            self._fail(f"tensor {name!r} has type {quantization}, which is not known")
        block_size, block_bytes = GGML_QUANT_SIZES[_QUANTIZATIONS[quantization]]
        num_elements = math.prod(shape)
        if not 0 < num_elements < 2**60:
            self._fail(
                f"tensor {name!r} has shape {list(shape)}, expected sizes of at least 1 and a product below 2^60"
            )
        if shape[-1] % block_size:
            self._fail(f"tensor {name!r} has rows of {shape[-1]} elements, expected a multiple of {block_size}")
        if offset % alignment:
            self._fail(f"tensor {name!r} starts at data byte {offset}, expected a multiple of {alignment}")
        num_bytes = num_elements // block_size * block_bytes
        end = data_start + offset + num_bytes
        if end > self._file_bytes:
            self._fail_short(f"tensor {name!r} ends at byte {end}")
        return GGUFTensor(
            name=name,
            quantization=_QUANTIZATIONS[quantization],
            shape=shape,
            path=self._path,
            offset=data_start + offset,
            num_bytes=num_bytes,
        )

    def _check_layout(self, tensors: list[GGUFTensor]) -> None:
        names: set[str] = set()
        end = 0
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.name in names:
                self._fail(f"tensor {tensor.name!r} occurs twice")
            if tensor.offset < end:
                self._fail(f"tensor {tensor.name!r} overlaps the one before it: byte {tensor.offset}, expected {end}")
            names.add(tensor.name)
            end = tensor.offset + tensor.num_bytes

    def _read_u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _read_string(self, what: str) -> str:
        num_bytes = int.from_bytes(self._take(8, what), "little")
        if num_bytes > MAX_STRING_BYTES:
            self._fail(f"{what} is a string of {num_bytes} bytes, at most {MAX_STRING_BYTES} are allowed")
        try:
            return self._take(num_bytes, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self._fail(f"{what} is not UTF-8: {error.reason}")

    def _take(self, num_bytes: int, what: str) -> bytes:
        if self._position + num_bytes > self._file_bytes:
            self._fail_short(f"{what} ends at byte {self._position + num_bytes}")
        taken = self._file.read(num_bytes)
        if len(taken) < num_bytes:
            self._fail_short("the file shrank while it was read")
        self._position += num_bytes
        return taken

    def _check_count(self, count: int, min_bytes: int, what: str) -> None:
        if count * min_bytes > self._file_bytes - self._position:
            self._fail_short(f"it claims {count} {what}")

    def _fail(self, problem: str) -> NoReturn:
        raise HeaderError(f"{self._path}: {problem}; the file is damaged, pull it again")

    def _fail_short(self, problem: str) -> NoReturn:
        raise TruncatedFile(
            f"{self._path}: {self._file_bytes} bytes, but {problem}; the file is damaged, pull it again"
        )
