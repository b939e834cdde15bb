"""What the daemon and a worker tell each other, as msgpack over ZeroMQ; never pickle."""

from __future__ import annotations

import msgspec

from ..errors import FlashError, error_classes
from ..request import EngineRequest, SequenceDelta


class WireError(msgspec.Struct, frozen=True):
    """A typed error on its way through a socket."""

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> WireError:
        """Pack `error`; anything that is not ours becomes an internal error without its text's details lost."""
        if isinstance(error, FlashError):
            return cls(error.code, error.message, error.param)
        return cls(FlashError.code, f"{type(error).__name__}: {error}")

    def unpack(self) -> FlashError:
        """The error again, as the class its code names."""
        return error_classes().get(self.code, FlashError)(self.message, param=self.param)


class LoadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make a model ready; every one is answered by `ModelLoaded` or `LoadFailed`, also those that share one load.

    A loaded model has its keep-alive renewed. One that is loaded with another `dtype` or `max_model_len` than is asked
    for is refused: unload it first.
    """

    model: str
    folder: str
    """Holds `config.json` and the safetensors files."""
    dtype: str | None = None
    """Dtype to compute in; None: the checkpoint's."""
    max_model_len: int | None = None
    keep_alive_s: float | None = None
    """None: as it was, or the worker's default; negative: for ever."""
    is_pinned: bool = False
    """Never evicted to make room."""


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop a model after its running requests end; answered by `ModelUnloaded`. Unknown models are answered too."""

    model: str


class KeepAlive(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Change how long a loaded model stays when idle."""

    model: str
    keep_alive_s: float


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run a request; answered by `Deltas` until every answer has a finish reason, or by `RequestFailed`.

    While its model loads or leaves, the request waits. `model_not_found` says that the model is not loaded and that
    nothing was generated: load it and send the request again.
    """

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop answers of a request; their last delta says `abort`. An unknown or finished request is ignored."""

    request_id: str
    index: int | None = None
    """Only this answer; None: all of the request's."""
    finish_reason: str = "abort"
    """What the last delta says: `stop` where a stop string was found in the text."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop now: running requests are failed."""


Command = LoadModel | UnloadModel | KeepAlive | Generate | Abort | Shutdown


class WorkerReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker's first message."""

    pid: int
    device: str
    """For example `cpu` or `cuda:0`."""
    device_name: str
    total_bytes: int
    """Memory that weights and KV caches may take together."""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How far a load has come."""

    model: str
    phase: str
    """`plan`, `read` or `prepare`."""
    done_bytes: int
    total_bytes: int


class ModelLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model is ready."""

    model: str
    weight_bytes: int
    kv_cache_bytes: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    dtype: str
    phase_seconds: dict[str, float]
    """Seconds by phase: `plan`, `read`, `prepare`."""
    was_loaded: bool = False
    """It was there already."""


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model could not be loaded; whatever served before still serves."""

    model: str
    error: WireError


class ModelUnloaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model has left the device."""

    model: str
    reason: str
    """`unload`, `keep_alive`, `evicted`, `failed` (a step went wrong) or `not_loaded`."""


class Deltas(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """New tokens of any number of answers, from one step."""

    deltas: list[SequenceDelta]


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request ended without an answer."""

    request_id: str
    error: WireError


class ModelStats(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model's state."""

    model: str
    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of KV blocks in use by running sequences, 0 … 1."""
    weight_bytes: int
    kv_cache_bytes: int
    expires_in_s: float | None
    """Seconds until an idle model leaves; None: never, or not idle."""
    is_pinned: bool
    num_preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache since the load."""
    prefix_hits: int
    """Of those, tokens found."""


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent about once a second while there is work, when it ends, and after every change of what is loaded."""

    models: list[ModelStats]
    loading: list[str]
    free_bytes: int


Event = WorkerReady | LoadProgress | ModelLoaded | LoadFailed | ModelUnloaded | Deltas | RequestFailed | Stats
