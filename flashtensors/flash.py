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
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from .checkpoint.safetensors import SINGLE_FILE, TensorToWrite, open_checkpoint, write_safetensors
from .checkpoint.safetensors_header import TensorEntry, read_metadata
from .errors import CheckpointError, ConfigError, StoreError
from .memory.arena import Arena
from .transfer.crew import Progress
from .transfer.dtypes import FILE_DTYPES
from .transfer.load_plan import make_copy_plan
from .transfer.pipeline import CHUNK_SIZE, NUM_THREADS, LoadStats, load
from .transfer.progress_sum import ProgressSum
from .transfer.tensor_views import TensorView, find_views, restore_view

DeviceSpec = int | str | torch.device
"""A device; an int is the index of a CUDA device."""

GPU_THREADS = 16
"""Threads that read to a GPU where the caller does not say."""
LEAST_CHUNK_BYTES = 4096
"""Of `load_dict`: what reads past the page cache are multiples of."""

_METADATA_KEY = "flashtensors"
_COPY_BYTES = 64 * 1024**2


@dataclass(slots=True, kw_only=True)
class DictStats:
    """What one `save_dict` or `load_dict` took; the call fills it in anew."""

    num_bytes: int = 0
    """Bytes of tensors that were moved; a tensor that shares its elements with another counts once."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Wall seconds by phase: `plan`, `prepare` (files opened, memory pinned), `read`, `restore`; or `plan`, `write`."""
    readers: tuple[str, ...] = ()
    """How files were read, by device in the order of loading: `direct`, `buffered` or both."""

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes moved per second of all phases, in units of 10^9."""
        return self.num_bytes / max(sum(self.phase_seconds.values()), 1e-9) / 1e9

    def add(self, load_stats: LoadStats) -> None:
        """Count the load of one device's tensors."""
        self.num_bytes += load_stats.num_bytes
        self.readers += (load_stats.reader,)
        for phase, seconds in load_stats.phase_seconds.items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds


class _Raw(msgspec.Struct, frozen=True):
    """A tensor that is stored as its bytes."""

    dtype: str
    shape: tuple[int, ...]


class _Extras(msgspec.Struct, frozen=True):
    """What the safetensors format cannot say."""

    views: dict[str, TensorView] = {}
    raw: dict[str, _Raw] = {}


def save_dict(
    state_dict: Mapping[str, Tensor],
    path: str | Path,
    *,
    progress: Progress | None = None,
    stats: DictStats | None = None,
) -> None:
    """Write tensors of any dtype, layout and device to folder `path`, which appears or changes at once or not at all.

    The folder is made where it is missing. A `model.safetensors` that is in it is replaced; other files are left alone.

    Args:
        state_dict: The tensors, by name.
        path: The folder.
        progress: Told about bytes that were written.
        stats: Filled in.

    Raises:
        CheckpointError: A value that is no dense tensor with data, named with what it is.
        DiskFull, StoreError: It cannot be written; what was there before is still there.
    """
    started_s = time.perf_counter()
    folder = Path(path)
    for name, value in state_dict.items():
        _check_storable(name, value)
    views = find_views(state_dict)
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
    planned_s = time.perf_counter()
    counter = ProgressSum(progress, sum(tensor.numel() * tensor.dtype.itemsize for tensor in stored.values()))
    tensors = (_to_write(name, tensor, counter) for name, tensor in stored.items())
    write_safetensors(folder / SINGLE_FILE, tensors, {"format": "pt", _METADATA_KEY: extras})
    counter.finish()
    if stats is not None:
        stats.num_bytes, stats.readers = counter.total_bytes, ()
        stats.phase_seconds = {"plan": planned_s - started_s, "write": time.perf_counter() - planned_s}


def load_dict(
    path: str | Path,
    device_map: Mapping[str, DeviceSpec] | None = None,
    *,
    num_threads: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
    stats: DictStats | None = None,
) -> dict[str, Tensor]:
    """Read the tensors of folder `path` to their devices: what `save_dict` wrote, or any safetensors checkpoint.

    Args:
        path: The folder.
        device_map: Module prefix to device. A prefix claims the name itself and names that go on with a dot, so
            `model.layers.1` does not claim `model.layers.10`; `""` claims all; the longest prefix wins.
            None: `{"": "cpu"}`.
        num_threads: Threads that read; None: 4 to host memory, 16 to a GPU.
        chunk_size: Bytes of one read, rounded down to whole pages of 4096.
        progress: Told about bytes that have arrived, on all devices together.
        stats: Filled in.

    Raises:
        ConfigError: A tensor that no prefix claims, a device that does not exist, or a number that is too small.
        CheckpointError: The files are damaged, or not there.
        CapacityError: A device has no room.
        TransferError: A read failed.
    """
    started_s = time.perf_counter()
    _check_numbers(num_threads, chunk_size)
    stats = DictStats() if stats is None else stats
    stats.num_bytes, stats.phase_seconds, stats.readers = 0, {}, ()
    folder = Path(path)
    checkpoint = open_checkpoint(folder)
    extras = _read_extras(checkpoint.tensors.values())
    devices = {name: _find_device(name, device_map or {"": "cpu"}) for name in [*checkpoint.tensors, *extras.views]}
    plans = {
        device: make_copy_plan(entry for entry in checkpoint.tensors.values() if devices[entry.name] == device)
        for device in dict.fromkeys(devices[name] for name in checkpoint.tensors)
    }
    stats.phase_seconds["plan"] = time.perf_counter() - started_s
    counter = ProgressSum(progress, sum(plan.file_bytes for plan in plans.values()))
    loaded: dict[str, Tensor] = {}
    for device, plan in plans.items():
        with Arena.allocate(plan.num_bytes, device) as arena:
            threads = num_threads or (NUM_THREADS if device.type == "cpu" else GPU_THREADS)
            stats.add(load(plan, arena, num_threads=threads, chunk_size=chunk_size, progress=counter.report))
            loaded |= plan.tensors(arena)
        counter.add(plan.file_bytes)
    read_s = time.perf_counter()
    for name, raw in extras.raw.items():
        loaded[name] = _restore_raw(folder, name, raw, loaded)
    for name, view in extras.views.items():
        loaded[name] = restore_view(folder, name, view, loaded).to(devices[name])
    stats.phase_seconds["restore"] = time.perf_counter() - read_s
    return loaded


def _check_numbers(num_threads: int | None, chunk_size: int) -> None:
    if num_threads is not None and num_threads < 1:
        raise ConfigError(
            f"num_threads is {num_threads}, but it must be 1 or more, or None for {NUM_THREADS} to host memory and "
            f"{GPU_THREADS} to a GPU",
            param="num_threads",
        )
    if chunk_size < LEAST_CHUNK_BYTES:
        raise ConfigError(
            f"chunk_size is {chunk_size}, but it must be {LEAST_CHUNK_BYTES} bytes or more; leave it out for "
            f"{CHUNK_SIZE}",
            param="chunk_size",
        )


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


def _to_write(name: str, tensor: Tensor, counter: ProgressSum) -> TensorToWrite:
    dtype = FILE_DTYPES.get(tensor.dtype)
    if dtype is None:
        return name, "U8", (tensor.numel() * tensor.dtype.itemsize,), _chunks(tensor, counter)
    return name, dtype, tuple(tensor.shape), _chunks(tensor, counter)


def _chunks(tensor: Tensor, counter: ProgressSum) -> Iterator[memoryview]:
    """The elements in row-major order, as host bytes, a bounded number at a time when a copy is needed."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    bytes_B = dense.view(torch.uint8)
    for start in range(0, bytes_B.numel(), _COPY_BYTES):
        chunk = bytes_B[start : start + _COPY_BYTES].cpu().numpy().data
        yield chunk
        counter.tick(len(chunk))


def _read_extras(entries: Iterable[TensorEntry]) -> _Extras:
    """Our metadata in the files of a checkpoint; empty for a file of another writer."""
    views: dict[str, TensorView] = {}
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
