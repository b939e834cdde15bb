"""Conversion of a checkpoint to fp8: the projections of its layers, with a scale for each row of a weight.

Embeddings, norms, the head and biases stay as they are, bit for bit. The files keep their names and the order of their
tensors; `config.json` says what was done, as llm-compressor writes it, so that other engines read the result too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, UnsupportedModel
from .architecture import read_model_config
from .config_fp8 import fp8_config
from .durable import disk_errors
from .fp8_values import FLOAT_DTYPES, bits_dtype, quantize_rows, row_scales
from .inventory import WEIGHT_PATTERN, is_model_file
from .safetensors import INDEX_FILE, TensorToWrite, open_checkpoint, write_safetensors
from .safetensors_header import TensorEntry
from .tensor_names import tensor_shapes

Progress = Callable[[int, int], None]
"""Called with bytes of the source done so far and bytes in all."""

_SLAB_ELEMENTS = 1024**2
_COPY_BYTES = 16 * 1024**2


def quantize_checkpoint(folder: Path, out_folder: Path, progress: Progress | None = None) -> None:
    """Write the model in `folder` to `out_folder` with its projections in fp8.

    The folder is made when it is missing; it belongs to the caller, who throws it away when this raises.

    Args:
        folder: In Hugging Face layout, not quantised.
        out_folder: Where to write.
        progress: See `Progress`.

    Raises:
        UnsupportedModel: It is quantised already, has experts, or weights in a dtype that cannot be rounded.
        CheckpointError: A file is damaged, or a weight is infinite or no number.
        DiskFull, StoreError: Nothing could be written.
    """
    config = read_model_config(folder)
    if config.quantization is not None:
        raise UnsupportedModel(f"{folder}: the weights are fp8 already; pull it without quantization")
    if config.experts is not None:
        raise UnsupportedModel(f"{folder}: experts in fp8 do not run here; pull it without quantization")
    names = {name for name, shape in tensor_shapes(config).items() if name.endswith("_proj.weight") and len(shape) == 2}
    checkpoint = open_checkpoint(folder)
    conversion = _Conversion(names, checkpoint.num_bytes, progress)
    entries: dict[Path, list[TensorEntry]] = {}
    for entry in checkpoint.tensors.values():
        entries.setdefault(entry.path, []).append(entry)
    with disk_errors(out_folder):
        out_folder.mkdir(parents=True, exist_ok=True)
        weight_map: dict[str, str] = {}
        for path, of_file in entries.items():
            tensors = [tensor for entry in of_file for tensor in conversion.convert(entry)]
            write_safetensors(out_folder / path.name, tensors, {"format": "pt"})
            weight_map |= {tensor[0]: path.name for tensor in tensors}
        if len(entries) > 1:
            _write_json(out_folder / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
        _copy_others(folder, out_folder)


class _Conversion:
    """Turns tensors of a checkpoint into those of its copy, a slab of rows at a time."""

    def __init__(self, names: set[str], total_bytes: int, progress: Progress | None) -> None:
        self._names = names
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress

    def convert(self, entry: TensorEntry) -> Iterator[TensorToWrite]:
        """The tensor itself, or its values in fp8 and their scales; bytes are read when they are asked for."""
        if entry.name not in self._names:
            yield entry.name, entry.dtype, entry.shape, self._copy(entry)
            return
        if entry.dtype not in FLOAT_DTYPES or len(entry.shape) != 2:
            raise UnsupportedModel(
                f"{entry.path}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, but a matrix of "
                f"{', '.join(FLOAT_DTYPES)} is needed; pull it without quantization"
            )
        num_rows = entry.shape[0]
        scales_O = np.ones(num_rows, np.float32)  # a file has wide elements first: scales are written before values
        yield f"{entry.name}_scale", "F32", (num_rows, 1), self._scales(entry, scales_O)
        yield entry.name, "F8_E4M3", entry.shape, self._values(entry, scales_O)

    def _scales(self, entry: TensorEntry, scales_O: np.ndarray) -> Iterator[bytes]:
        """The scales, which `scales_O` gains too."""
        start = 0
        for bits_OI in _slabs(entry):
            scales_O[start : start + len(bits_OI)] = row_scales(bits_OI, entry.dtype)
            start += len(bits_OI)
        if not np.isfinite(scales_O).all():
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} has values that are infinite or no numbers, so it cannot be "
                "quantised; pull it again, or without quantization"
            )
        yield scales_O.astype("<f4").tobytes()

    def _values(self, entry: TensorEntry, scales_O: np.ndarray) -> Iterator[bytes]:
        start = 0
        for bits_OI in _slabs(entry):
            yield quantize_rows(bits_OI, entry.dtype, scales_O[start : start + len(bits_OI)]).tobytes()
            start += len(bits_OI)
            self._advance(bits_OI.nbytes)

    def _copy(self, entry: TensorEntry) -> Iterator[bytes]:
        for start in range(0, entry.num_bytes, _COPY_BYTES):
            chunk = _read(entry, start, min(_COPY_BYTES, entry.num_bytes - start))
            yield chunk.tobytes()
            self._advance(len(chunk))

    def _advance(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


def _slabs(entry: TensorEntry) -> Iterator[np.ndarray]:
    """Whole rows of a matrix, as the bits of their elements."""
    num_rows, num_columns = entry.shape
    row_bytes = entry.num_bytes // max(1, num_rows)
    step = max(1, _SLAB_ELEMENTS // max(1, num_columns))
    for row in range(0, num_rows, step):
        count = min(step, num_rows - row)
        raw = _read(entry, row * row_bytes, count * row_bytes)
        yield raw.view(bits_dtype(entry.dtype)).reshape(count, num_columns)


def _read(entry: TensorEntry, start: int, num_bytes: int) -> np.ndarray:
    with open(entry.path, "rb") as file:
        raw = np.fromfile(file, np.uint8, num_bytes, offset=entry.offset + start)
    if raw.size < num_bytes:
        raise CheckpointError(f"{entry.path}: the file shrank while {entry.name!r} was read; pull it again")
    return raw


def _copy_others(folder: Path, out_folder: Path) -> None:
    """Configuration, tokenizer and whatever else belongs to the model beside its weights."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_model_file(path.name) and not path.match(WEIGHT_PATTERN) and path.name != INDEX_FILE:
            shutil.copyfile(path, out_folder / path.name)
    config = json.loads((folder / "config.json").read_bytes())
    _write_json(out_folder / "config.json", {**config, "quantization_config": fp8_config()})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
