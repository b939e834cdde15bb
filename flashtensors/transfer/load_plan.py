"""Which bytes of which files go where in an arena: made from headers alone, before anything is read.

A fused weight (q|k|v, gate|up) is a concatenation of rows, so each checkpoint tensor is one contiguous extent of it and
the files are read in place. Everything that can be wrong with a checkpoint's tensors is found here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.layout import Weight, WeightLayout
from ..checkpoint.safetensors import Checkpoint
from ..checkpoint.safetensors_header import TensorEntry
from ..errors import CheckpointError, UnsupportedModel
from ..memory.arena import Arena, align
from .dtypes import TORCH_DTYPES
from .file_state import FileState

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that a model's weights may have, in the checkpoint and in memory; any is converted to any."""

_FP8 = torch.float8_e4m3fn
_OWN_DTYPES = {"float8_e4m3fn": _FP8, "float32": torch.float32}
"""Dtypes that a weight may have whatever the model's is."""

_IGNORED = re.compile(
    r"(^|\.)rotary_emb\.inv_freq$"  # computed from the configuration
    r"|^(model\.)?(vision_tower|multi_modal_projector)\."  # parts of a multimodal model beside its language model
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One checkpoint tensor's bytes on their way from a file to an arena."""

    name: str
    """Of the tensor in the checkpoint."""
    path: Path
    file_offset: int
    num_bytes: int
    """In the file."""
    arena_offset: int
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    layer: int | None = None
    """Decoder layer that computes with it; None for what comes before the first or after the last."""

    @property
    def is_converted(self) -> bool:
        """Whether the elements change dtype on the way; otherwise the bytes are copied as they are."""
        return self.source_dtype != self.target_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the arena."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    arena_offset: int


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Extents in the order of execution, and the tensors that they make up."""

    extents: tuple[Extent, ...]
    planned_tensors: tuple[PlannedTensor, ...]
    files: dict[Path, FileState]
    num_bytes: int
    """Size of the arena that the tensors need."""
    file_bytes: int
    """Bytes that are read."""

    @functools.cached_property
    def signature(self) -> str:
        """Digest of where every tensor lies in the arena, and as what: plans of one signature can share an arena."""
        text = repr([(tensor.name, tensor.shape, tensor.dtype, tensor.arena_offset) for tensor in self.planned_tensors])
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def identity(self) -> str:
        """Digest of which bytes of which files, as they are now, go where: plans of one identity load the same."""
        digest = hashlib.sha256(self.signature.encode())
        for path, state in self.files.items():
            digest.update(repr((str(path), state.num_bytes, state.modified_ns)).encode())
        for extent in self.extents:
            where = (str(extent.path), extent.file_offset, extent.num_bytes, extent.arena_offset, extent.source_dtype)
            digest.update(repr(where).encode())
        return digest.hexdigest()

    def tensors(self, arena: Arena) -> dict[str, Tensor]:
        """The plan's tensors as views of `arena`, by name."""
        return {
            tensor.name: arena.view(tensor.arena_offset, tensor.shape, tensor.dtype) for tensor in self.planned_tensors
        }


def make_load_plan(layout: WeightLayout, checkpoint: Checkpoint, dtype: str) -> LoadPlan:
    """Plan to load a model's weights as `dtype` (a key of `WEIGHT_DTYPES`), each weight aligned in the arena.

    Checkpoint tensors that the layout does not use are refused, because a weight that is ignored is a wrong model.
    The exceptions are `rotary_emb.inv_freq`, the vision parts of a multimodal model, and an `lm_head.weight` of the
    embedding's shape where the layout ties the head to the embedding.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another shape than the architecture wants.
        UnsupportedModel: `dtype`, or the dtype of a checkpoint tensor, is not one of `WEIGHT_DTYPES`.
    """
    model_dtype = WEIGHT_DTYPES.get(dtype)
    if model_dtype is None:
        raise UnsupportedModel(f"dtype is {dtype!r}, but weights are loaded as {', '.join(WEIGHT_DTYPES)}")
    _check_names(layout, checkpoint)
    extents: list[Extent] = []
    planned: list[PlannedTensor] = []
    offset = 0
    for weight in _in_file_order(layout.weights):
        target_dtype = model_dtype if weight.dtype is None else _OWN_DTYPES[weight.dtype]
        planned.append(PlannedTensor(name=weight.name, shape=weight.shape, dtype=target_dtype, arena_offset=offset))
        row_offset = offset
        for name, shape in zip(weight.sources, weight.source_shapes, strict=True):
            entry = checkpoint.tensors[name]
            extent = _extent(entry, row_offset, _check_entry(entry, shape, weight), target_dtype, weight.layer)
            extents.append(extent)
            row_offset += entry.num_bytes // extent.source_dtype.itemsize * target_dtype.itemsize
        offset += align(weight.num_elements * target_dtype.itemsize)
    return _plan(extents, planned, offset)


def _in_file_order(weights: Sequence[Weight]) -> Iterator[Weight]:
    """Weights layer by layer, within a layer by the names of their sources.

    Files have their tensors in the order of their names, so what lies side by side in a file lies side by side in the
    arena too, and goes there in one copy. Names alone decide: all models of one architecture get the same arena.
    """
    for _, of_layer in itertools.groupby(weights, key=lambda weight: weight.layer):
        yield from sorted(of_layer, key=lambda weight: min(weight.sources))


def make_copy_plan(entries: Iterable[TensorEntry]) -> LoadPlan:
    """Plan to load tensors as they are: same names, shapes and dtypes, in the order given.

    Raises:
        UnsupportedModel: torch has no dtype for a tensor.
    """
    extents: list[Extent] = []
    planned: list[PlannedTensor] = []
    offset = 0
    for entry in entries:
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise UnsupportedModel(f"{entry.path}: tensor {entry.name!r} is {entry.dtype}, which torch cannot hold")
        extents.append(_extent(entry, offset, dtype, dtype))
        planned.append(PlannedTensor(name=entry.name, shape=entry.shape, dtype=dtype, arena_offset=offset))
        offset += align(entry.num_bytes)
    return _plan(extents, planned, offset)


def _plan(extents: Sequence[Extent], planned: Sequence[PlannedTensor], num_bytes: int) -> LoadPlan:
    return LoadPlan(
        extents=tuple(extents),
        planned_tensors=tuple(planned),
        files={path: FileState.of(path) for path in dict.fromkeys(extent.path for extent in extents)},
        num_bytes=num_bytes,
        file_bytes=sum(extent.num_bytes for extent in extents),
    )


def _extent(
    entry: TensorEntry, arena_offset: int, source: torch.dtype, target: torch.dtype, layer: int | None = None
) -> Extent:
    return Extent(
        name=entry.name,
        path=entry.path,
        file_offset=entry.offset,
        num_bytes=entry.num_bytes,
        arena_offset=arena_offset,
        source_dtype=source,
        target_dtype=target,
        layer=layer,
    )


def _check_names(layout: WeightLayout, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` unless the checkpoint has the layout's tensors and no others."""
    wanted = {source for weight in layout.weights for source in weight.sources}
    missing = [name for weight in layout.weights for name in weight.sources if name not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{_where(checkpoint)}: {_listing(missing)} missing, but the architecture of config.json needs "
            f"{'it' if len(missing) == 1 else 'them'}; the weights and config.json are not of one model"
        )
    unexpected = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not _IGNORED.search(name) and not _is_tied_head(name, layout, checkpoint)
    ]
    if unexpected:
        raise CheckpointError(
            f"{_where(checkpoint)}: {_listing(unexpected)} unknown to the architecture of config.json; "
            "leaving weights out would give a wrong model"
        )


def _is_tied_head(name: str, layout: WeightLayout, checkpoint: Checkpoint) -> bool:
    """Whether `name` is a copy of the embedding: a head, in a layout that starts with the embedding and has no head."""
    return (
        name.removeprefix("language_model.") == "lm_head.weight"
        and checkpoint.tensors[name].shape == layout.weights[0].shape
    )


def _check_entry(entry: TensorEntry, shape: tuple[int, ...], weight: Weight) -> torch.dtype:
    """The dtype of a checkpoint tensor, after checking that it can become (part of) `weight`."""
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r} has shape {list(entry.shape)}, but {weight.name} of the architecture "
            f"of config.json needs {list(shape)}; the weights and config.json are not of one model"
        )
    dtype = TORCH_DTYPES.get(entry.dtype)
    if weight.dtype is not None and _OWN_DTYPES[weight.dtype] == _FP8:
        if dtype == _FP8:
            return _FP8
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r} is {entry.dtype}, but the quantization_config of config.json makes "
            "it F8_E4M3; the weights and config.json are not of one model"
        )
    if dtype is None or dtype not in WEIGHT_DTYPES.values():
        raise UnsupportedModel(
            f"{entry.path}: tensor {entry.name!r} is {entry.dtype}, but weights must be F32, BF16 or F16; "
            "a quantised checkpoint needs a quantization_config in config.json, choose the original one"
        )
    return dtype


def _where(checkpoint: Checkpoint) -> str:
    paths = list(dict.fromkeys(entry.path for entry in checkpoint.tensors.values()))
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}" if paths else "checkpoint without tensors"


def _listing(names: Sequence[str]) -> str:
    """`tensor 'a' is`, or `tensors 'a', 'b', 'c' and 4 more are`."""
    if len(names) == 1:
        return f"tensor {names[0]!r} is"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(repr(name) for name in names[:3])}{more} are"
