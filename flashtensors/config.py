"""What a user may set, and where each value came from.

Precedence: keyword or flag, then environment (`FLASH_<FIELD>`), then `config.toml` in the store, then the default.
The environment is read here and nowhere else.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from .errors import ConfigError

ENV_PREFIX = "FLASH_"

_SI = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE_UNITS = {**_SI, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a daemon, a command or an embedded engine. Sizes are bytes; text such as `30GiB` is understood."""

    storage_path: str = "~/.flashtensors"
    """The store: catalog, converted weights, logs, sockets."""
    server_host: str = "127.0.0.1"
    """Address the daemon binds. Anything but loopback wants an API key."""
    server_port: int = 8073
    """TCP port of the daemon."""
    api_key: str | None = None
    """Key that every request must carry (`Authorization: Bearer …`); None: no key, loopback only."""
    allow_unauthenticated: bool = False
    """Let a daemon that others can reach run without a key."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    gpu_memory_utilization: float = 0.8
    """Share of the device's memory that weights and KV caches may take together."""
    mem_pool_size: int | None = None
    """Bytes of host memory for model weights; None: a share of what is free."""
    chunk_size: int | None = None
    """Bytes of a file that are copied at once; while digests are verified, a multiple of 16 MiB. None: 16 MiB."""
    num_threads: int | None = None
    """Threads that read weights; None: 16 on a GPU, 4 on a CPU."""
    verify_digests: bool = True
    """Compare what is read from disk with what was read the first time; a model with other bytes is not served."""
    enforce_eager: bool = False
    """Capture no CUDA graphs: slower, for finding faults."""
    kv_cache_size: int | None = None
    """Bytes of KV cache for one model; None: a share of what is left beside the weights."""
    max_model_len: int | None = None
    """Most tokens in a sequence; None: what the model was trained for, bounded by the KV cache."""
    kv_cache_dtype: str = "auto"
    """`auto`, as the weights, or `fp8`, which holds twice as many tokens; on Ada, Hopper and later GPUs."""
    max_num_seqs: int = 256
    """Sequences that run at once."""
    max_tokens_per_step: int | None = None
    """Tokens that one engine step may compute; None: 8192 on a GPU, 2048 on a CPU."""
    enable_prefix_caching: bool = True
    """Keep the KV cache of finished prompts and reuse it for prompts that begin alike."""
    keep_alive_s: float = 300.0
    """Seconds that an idle model stays loaded; negative: for ever."""
    swap_patience_s: float | None = None
    """Seconds that a request waits for its model before busy models must make room; None: four swaps, at least 0.5."""
    kv_keep_share: float = 0.1
    """Share of the device's budget that KV caches of evicted models may keep until somebody needs the room."""
    preload: str = ""
    """Models that a daemon loads when it starts, separated by commas."""
    worker_timeout_s: float | None = None
    """Seconds without an answer after which a worker is replaced; None: 60 on a GPU, 900 on a CPU."""
    max_queue: int = 512
    """Requests that may wait for one model before new ones are refused with 503; batches never fill it for others."""
    shutdown_timeout_s: float = 30.0
    """Seconds that running requests get to finish when the daemon stops."""
    hf_token: str | None = None
    """Token for the hub; None: what `huggingface_hub` finds."""

    def __post_init__(self) -> None:
        """Check every value; raises `ConfigError` that names the field."""
        _check("server_port", self.server_port, 0 <= self.server_port < 65536, "between 0 and 65535")
        share = self.gpu_memory_utilization
        _check("gpu_memory_utilization", share, 0.0 < share <= 1.0, "in (0, 1]")
        chunk_size = self.chunk_size
        _check("chunk_size", chunk_size, chunk_size is None or chunk_size >= 4096, "at least 4096 bytes, or unset")
        for name in ("max_num_seqs", "max_queue"):
            value = getattr(self, name)
            _check(name, value, value >= 1, "at least 1")
        for name in ("num_threads", "mem_pool_size", "kv_cache_size", "max_model_len", "max_tokens_per_step"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1, or unset")
        _check("kv_keep_share", self.kv_keep_share, 0.0 <= self.kv_keep_share <= 1.0, "between 0 and 1")
        patience_s, timeout_s = self.swap_patience_s, self.worker_timeout_s
        _check("swap_patience_s", patience_s, patience_s is None or patience_s >= 0, "0 or more, or unset")
        _check("worker_timeout_s", timeout_s, timeout_s is None or timeout_s >= 1, "at least 1 second, or unset")
        is_device = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _check("device", self.device, is_device, "auto, cpu, cuda or cuda:N")
        _check("kv_cache_dtype", self.kv_cache_dtype, self.kv_cache_dtype in ("auto", "fp8"), "auto or fp8")

    @property
    def store(self) -> Path:
        """The store's folder, with `~` expanded."""
        return Path(self.storage_path).expanduser()

    @property
    def kernel_store(self) -> Path:
        """Where compiled kernels are kept."""
        return self.store / "kernels"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the daemon."""
        return self.server_host in _LOOPBACK_HOSTS

    def check_exposure(self) -> None:
        """Raise `ConfigError` when a daemon with these settings would be open to the network without a key."""
        if not (self.is_loopback or self.api_key or self.allow_unauthenticated):
            raise ConfigError(
                f"server_host {self.server_host} is reachable from other machines and no api_key is set; "
                "set api_key, bind 127.0.0.1, or set allow_unauthenticated to say that you mean it"
            )


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ConfigError(f"{name} is {value!r}, but it must be {allowed}", param=name)


def parse_size(text: str | int) -> int:
    """Bytes in `text`: `4096`, `30GiB`, `1.5g` (SI units without the i, binary with it)."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write bytes or for example 512MiB, 30GiB, 16GB")
    return int(float(match[1]) * _SIZE_UNITS[match[2].lower()])


def parse_keep_alive(value: str | float | None, default_s: float) -> float:
    """Seconds of `keep_alive` in Ollama's grammar: seconds, `10m`, `1h30m`; 0 unloads, negative keeps for ever."""
    if value is None:
        return default_s
    if isinstance(value, bool):
        raise ConfigError(f"keep_alive is {value!r}; write seconds or for example 10m", param="keep_alive")
    if isinstance(value, int | float):
        return float(value)
    text = value.strip()
    sign, digits = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    if re.fullmatch(r"\d+(\.\d+)?", digits):
        return sign * float(digits)
    parts = _DURATION_PART.findall(digits)
    if not parts or "".join(number + unit for number, unit in parts) != digits:
        raise ConfigError(f"keep_alive is {value!r}; write seconds, 10m, 1h30m, -1 or 0", param="keep_alive")
    return sign * sum(float(number) * _DURATION_UNITS[unit] for number, unit in parts)


def load_settings(
    overrides: Mapping[str, object] | None = None, *, environ: Mapping[str, str] | None = None
) -> Settings:
    """Settings from keywords or flags, environment, `config.toml` in the store, and defaults, in that order.

    Args:
        overrides: Field to value; None values are as if absent.
        environ: The environment to read; the process's own when None.

    Raises:
        ConfigError: An unknown key (with the nearest known one), or a value of the wrong type or range.
    """
    environ = os.environ if environ is None else environ
    chosen = {key: value for key, value in (overrides or {}).items() if value is not None}
    from_env = {
        key[len(ENV_PREFIX) :].lower(): value
        for key, value in environ.items()
        if key.startswith(ENV_PREFIX) and key[len(ENV_PREFIX) :].lower() in Settings.__struct_fields__
    }
    storage_path = str(chosen.get("storage_path") or from_env.get("storage_path") or Settings().storage_path)
    from_file = _read_config_file(Path(storage_path).expanduser() / "config.toml")
    return settings_from({**from_file, **from_env, **chosen})


def settings_from(values: Mapping[str, object]) -> Settings:
    """Settings from a mapping alone; unknown keys raise and suggest the nearest known one."""
    known = Settings.__struct_fields__
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known settings: {', '.join(known)}"
            raise ConfigError(f"unknown setting {key!r}{hint}", param=key)
    parsed = {
        key: parse_size(value) if isinstance(value, str) and key in _SIZE_FIELDS else value
        for key, value in values.items()
    }
    try:
        return msgspec.convert(parsed, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"invalid setting: {error}") from error


_SIZE_FIELDS = frozenset({"mem_pool_size", "chunk_size", "kv_cache_size"})


def _read_config_file(path: Path) -> dict[str, object]:
    """What the file sets, checked by itself, so that an error names it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        settings_from(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", param=error.param) from error
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; storage_path must be a folder that can be read") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}; mend or remove it") from error
    return values
