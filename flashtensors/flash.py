"""Any dictionary of tensors to a folder and back, at the speed of the loader.

The folder holds one `model.safetensors`, which every reader of that format understands. What the format cannot say is
in its metadata, under `flashtensors`:

- *views*: a tensor that shares its elements with another is stored once. Tied tensors, and views of a contiguous
  tensor that is itself in the dictionary (transposed, sliced, strided), share memory again after loading, as long as
  they go to the same device. Tensors that merely overlap are stored apart.
- *raw*: tensors of dtypes that the format does not have (complex128, for example) are stored as their bytes.

All other tensors come back contiguous; values and shapes are always exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from .checkpoint.safetensors import SINGLE_FILE, TensorToWrite, open_checkpoint, write_safetensors
from .checkpoint.safetensors_header import TensorEntry, read_metadata
from .errors import CheckpointError, ConfigError, StoreError
from .memory.arena import Arena
from .transfer.dtypes import FILE_DTYPES
from .transfer.load_plan import make_copy_plan
from .transfer.pipeline import CHUNK_SIZE, NUM_THREADS, load

DeviceSpec = int | str | torch.device
"""A device; an int is the index of a CUDA device."""

_METADATA_KEY = "flashtensors"
_COPY_BYTES = 64 * 1024**2


class _View(msgspec.Struct, frozen=True):
    """A tensor as a view of another: sizes, strides and offset count elements of a contiguous `base`."""

    base: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Raw(msgspec.Struct, frozen=True):
    """A tensor that is stored as its bytes."""

    dtype: str
    shape: tuple[int, ...]


class _Extras(msgspec.Struct, frozen=True):
    """What the safetensors format cannot say."""

    views: dict[str, _View] = {}
    raw: dict[str, _Raw] = {}


def save_dict(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors of any dtype, layout and device to folder `path`, which appears or changes at once or not at all.

    The folder is made where it is missing. A `model.safetensors` that is in it is replaced; other files are left alone.

    Raises:
        CheckpointError: A value that is no dense tensor with data, named with what it is.
        DiskFull, StoreError: It cannot be written; what was there before is still there.
    """
    folder = Path(path)
    for name, value in state_dict.items():
        _check_storable(name, value)
    views = _find_views(state_dict)
    stored = {name: tensor for name, tensor in state_dict.items() if name not in views}
    raw = {
        name: _Raw(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in stored.items()
        if tensor.dtype not in FILE_DTYPES
    }
    extras = msgspec.json.encode(_Extras(views=views, raw=raw)).decode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be made: {error.strerror}") from error
    tensors = (_to_write(name, tensor) for name, tensor in stored.items())
    write_safetensors(folder / SINGLE_FILE, tensors, {"format": "pt", _METADATA_KEY: extras})


def load_dict(
    path: str | Path,
    device_map: Mapping[str, DeviceSpec] | None = None,
    *,
    num_threads: int = NUM_THREADS,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, Tensor]:
    """Read the tensors of folder `path` to their devices: what `save_dict` wrote, or any safetensors checkpoint.

    Args:
        path: The folder.
        device_map: Module prefix to device. A prefix claims the name itself and names that go on with a dot, so
            `model.layers.1` does not claim `model.layers.10`; `""` claims all; the longest prefix wins.
            None: `{"": "cpu"}`.
        num_threads: Threads that read.
        chunk_size: Bytes of one read.

    Raises:
        ConfigError: A tensor that no prefix claims, or a device that does not exist.
        CheckpointError: The files are damaged, or not there.
        CapacityError: A device has no room.
        TransferError: A read failed.
    """
    folder = Path(path)
    checkpoint = open_checkpoint(folder)
    extras = _read_extras(checkpoint.tensors.values())
    devices = {name: _find_device(name, device_map or {"": "cpu"}) for name in [*checkpoint.tensors, *extras.views]}
    loaded: dict[str, Tensor] = {}
    for device in dict.fromkeys(devices[name] for name in checkpoint.tensors):
        plan = make_copy_plan(entry for entry in checkpoint.tensors.values() if devices[entry.name] == device)
        with Arena.allocate(plan.num_bytes, device) as arena:
            load(plan, arena, num_threads=num_threads, chunk_size=chunk_size)
            loaded |= plan.tensors(arena)
    for name, raw in extras.raw.items():
        loaded[name] = _restore_raw(folder, name, raw, loaded)
    for name, view in extras.views.items():
        loaded[name] = _restore_view(folder, name, view, loaded).to(devices[name])
    return loaded


def _check_storable(name: object, value: object) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"state_dict has the key {name!r}, but names of tensors must be text")
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name!r} is a {type(value).__name__}, but only tensors can be saved; leave it out")
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        kind = "quantized" if value.is_quantized else "without data" if value.is_meta else str(value.layout)
        raise CheckpointError(
            f"tensor {name!r} ({value.dtype}) is {kind}, but only dense tensors with data can be saved"
        )


def _find_views(state_dict: Mapping[str, Tensor]) -> dict[str, _View]:
    """Tensors whose elements all belong to another tensor of the dictionary, which is stored for them."""
    views: dict[str, _View] = {}
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


def _find_view(tensor: Tensor, base_name: str, base: Tensor) -> _View | None:
    """`tensor` as a view of `base`, of the same storage and dtype, or None when it is not one."""
    offset = int(tensor.storage_offset() - base.storage_offset())
    if (offset, tensor.shape, tensor.stride()) == (0, base.shape, base.stride()):
        return _View(base_name, tuple(base.shape), _contiguous_strides(base.shape), 0)
    if base.is_contiguous() and offset >= 0 and offset + _reach(tensor.shape, tensor.stride()) <= base.numel():
        return _View(base_name, tuple(tensor.shape), tensor.stride(), offset)
    return None


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last of a view, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _to_write(name: str, tensor: Tensor) -> TensorToWrite:
    dtype = FILE_DTYPES.get(tensor.dtype)
    if dtype is None:
        return name, "U8", (tensor.numel() * tensor.dtype.itemsize,), _chunks(tensor)
    return name, dtype, tuple(tensor.shape), _chunks(tensor)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The elements in row-major order, as host bytes, a bounded number at a time when a copy is needed."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    bytes_B = dense.view(torch.uint8)
    for start in range(0, bytes_B.numel(), _COPY_BYTES):
        yield bytes_B[start : start + _COPY_BYTES].cpu().numpy().data


def _read_extras(entries: Iterable[TensorEntry]) -> _Extras:
    """Our metadata in the files of a checkpoint; empty for a file of another writer."""
    views: dict[str, _View] = {}
    raw: dict[str, _Raw] = {}
    for path in dict.fromkeys(entry.path for entry in entries):
        text = read_metadata(path).get(_METADATA_KEY, "{}")
        try:
            extras = msgspec.json.decode(text, type=_Extras)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path}: metadata {_METADATA_KEY!r} cannot be read: {error}") from error
        views |= extras.views
        raw |= extras.raw
    return _Extras(views=views, raw=raw)


def _find_device(name: str, device_map: Mapping[str, DeviceSpec]) -> torch.device:
    if not isinstance(device_map, Mapping):
        raise ConfigError(
            f'device_map is {device_map!r}, but it maps module prefixes to devices: {{"": {device_map!r}}}'
        )
    claims = [prefix for prefix in device_map if prefix in ("", name) or name.startswith(f"{prefix}.")]
    if not claims:
        raise ConfigError(f"device_map claims {', '.join(device_map)}, but not tensor {name!r}; add it, or '' for all")
    spec = device_map[max(claims, key=len)]
    try:
        device = torch.device("cuda", spec) if isinstance(spec, int) else torch.device(spec)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device_map sends {name!r} to {spec!r}, which is no device: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device_map sends {name!r} to {device}, but only cpu and cuda devices are loaded to")
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise ConfigError(
            f"device_map sends {name!r} to {spec!r}, but this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _restore_raw(folder: Path, name: str, raw: _Raw, loaded: Mapping[str, Tensor]) -> Tensor:
    dtype = getattr(torch, raw.dtype, None)
    stored = loaded.get(name)
    if not isinstance(dtype, torch.dtype) or stored is None or stored.numel() != math.prod(raw.shape) * dtype.itemsize:
        raise CheckpointError(f"{folder}: metadata of tensor {name!r} says {raw}, which does not fit its bytes")
    return stored.view(dtype).view(raw.shape)


def _restore_view(folder: Path, name: str, view: _View, loaded: Mapping[str, Tensor]) -> Tensor:
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
