"""Tensors that share their elements: found before they are written, and made again after they were loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from ..errors import CheckpointError


class TensorView(msgspec.Struct, frozen=True):
    """A tensor as a view of another: sizes, strides and offset count elements of a contiguous `base`."""

    base: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def find_views(state_dict: Mapping[str, Tensor]) -> dict[str, TensorView]:
    """Tensors whose elements all belong to another tensor of the dictionary, which is stored for them."""
    views: dict[str, TensorView] = {}
    bases: dict[tuple[torch.device, int, torch.dtype], list[str]] = {}
    # A base comes before its views: contiguous tensors first, long before short; otherwise in the order given.
    by_size = sorted(state_dict.items(), key=lambda item: (not item[1].is_contiguous(), -item[1].numel()))
    for name, tensor in by_size:
        if tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
            continue
        candidates = bases.setdefault((tensor.device, tensor.untyped_storage().data_ptr(), tensor.dtype), [])
        found = (view for base in candidates if (view := _find_view(tensor, base, state_dict[base])) is not None)
        view = next(found, None)
        if view is None:
            candidates.append(name)
        else:
            views[name] = view
    return views


def _find_view(tensor: Tensor, base_name: str, base: Tensor) -> TensorView | None:
    """`tensor` as a view of `base`, of the same storage and dtype, or None when it is not one."""
    offset = int(tensor.storage_offset() - base.storage_offset())
    if (offset, tensor.shape, tensor.stride()) == (0, base.shape, base.stride()):
        return TensorView(base_name, tuple(base.shape), _contiguous_strides(base.shape), 0)
    if base.is_contiguous() and offset >= 0 and offset + _reach(tensor.shape, tensor.stride()) <= base.numel():
        return TensorView(base_name, tuple(tensor.shape), tensor.stride(), offset)
    return None


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a view, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def restore_view(folder: Path, name: str, view: TensorView, loaded: Mapping[str, Tensor]) -> Tensor:
    """`view` of the tensor in `loaded` that it names; raises `CheckpointError` where it does not fit it."""
    base = loaded.get(view.base)
    is_sound = (
        base is not None
        and name not in loaded
        and len(view.shape) == len(view.strides)
        and min(view.shape, default=1) >= 1
        and min(view.strides, default=0) >= 0
        and view.offset >= 0
        and view.offset + _reach(view.shape, view.strides) <= base.numel()
    )
    if base is None or not is_sound:
        raise CheckpointError(f"{folder}: metadata of tensor {name!r} says {view}, which does not fit its base")
    return base.as_strided(view.shape, view.strides, base.storage_offset() + view.offset)
