"""Weights that are used where they lie in their files, without a copy: for models that compute on a CPU.

A weight that is one tensor of the checkpoint, of the dtype that is wanted, needs no place of its own: the file is
mapped, and the page cache is its memory, shared with every process that maps the same file. Fused and converted weights
are loaded as ever.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CapacityError
from ..memory.arena import align
from .file_state import FileState
from .load_plan import Extent, LoadPlan, PlannedTensor
from .readers.files import OpenFiles

MAPPED_ALIGNMENT = 64
"""Bytes that a tensor's place in its file must be a multiple of, to be as quick as in an arena."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MappedWeights:
    """A plan in two parts."""

    tensors: dict[str, Tensor]
    """Views of the files, by name, as long as they are used; writing to one does not change its file. A file that is
    cut short while it is mapped ends the process that reads beyond its end."""
    rest: LoadPlan
    """What has to be loaded to an arena, which is smaller by the bytes of `tensors`."""


def map_weights(plan: LoadPlan) -> MappedWeights:
    """Split `plan` into tensors that can be used in place, and the rest.

    Raises:
        FileChanged, CheckpointError: As `OpenFiles`.
        CapacityError: The system does not map a file.
    """
    extents = _extents_of_tensors(plan)
    in_place = {tensor.name for tensor in plan.planned_tensors if _can_be_mapped(tensor, extents[tensor.name])}
    paths = {extents[name][0].path for name in in_place}
    files = _map_files({path: state for path, state in plan.files.items() if path in paths})
    tensors: dict[str, Tensor] = {}
    kept: list[PlannedTensor] = []
    kept_extents: list[Extent] = []
    offset = 0
    for tensor in plan.planned_tensors:
        if tensor.name in in_place:
            (extent,) = extents[tensor.name]
            bytes_B = files[extent.path][extent.file_offset : extent.file_offset + extent.num_bytes]
            tensors[tensor.name] = bytes_B.view(tensor.dtype).view(tensor.shape)
            continue
        kept.append(replace(tensor, arena_offset=offset))
        moved_by = offset - tensor.arena_offset
        kept_extents += [replace(part, arena_offset=part.arena_offset + moved_by) for part in extents[tensor.name]]
        offset += align(_num_bytes(tensor))
    rest = LoadPlan(
        extents=tuple(kept_extents),
        planned_tensors=tuple(kept),
        files={path: plan.files[path] for path in dict.fromkeys(extent.path for extent in kept_extents)},
        num_bytes=offset,
        file_bytes=sum(extent.num_bytes for extent in kept_extents),
    )
    return MappedWeights(tensors=tensors, rest=rest)


def _num_bytes(tensor: PlannedTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _extents_of_tensors(plan: LoadPlan) -> dict[str, list[Extent]]:
    """Each tensor's extents; both lists of the plan are in the order of the arena."""
    parts: dict[str, list[Extent]] = {tensor.name: [] for tensor in plan.planned_tensors}
    not_empty = [extent for extent in plan.extents if extent.num_bytes > 0]
    waiting = iter(sorted(not_empty, key=lambda extent: extent.arena_offset))
    extent = next(waiting, None)
    for tensor in sorted(plan.planned_tensors, key=lambda tensor: tensor.arena_offset):
        end = tensor.arena_offset + _num_bytes(tensor)
        while extent is not None and extent.arena_offset < end:
            parts[tensor.name].append(extent)
            extent = next(waiting, None)
    return parts


def _can_be_mapped(tensor: PlannedTensor, extents: list[Extent]) -> bool:
    return (
        len(extents) == 1
        and not extents[0].is_converted
        and extents[0].num_bytes == _num_bytes(tensor)
        and extents[0].file_offset % MAPPED_ALIGNMENT == 0
    )


def _map_files(files: dict[Path, FileState]) -> dict[Path, Tensor]:
    mapped: dict[Path, Tensor] = {}
    with OpenFiles(files) as opened:
        for path, fd in opened.fds.items():
            try:
                memory = mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CapacityError(f"{path}: the system does not map this file: {error}") from error
            mapped[path] = torch.frombuffer(memory, dtype=torch.uint8)
    return mapped
