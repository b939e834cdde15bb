"""What the daemon and a worker tell each other, as msgpack over ZeroMQ; never pickle."""

from __future__ import annotations

import msgspec

from ..errors import FlashError, error_classes
from ..request import EngineRequest, SequenceDelta
from .stats import Stats


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


class Register(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Tell the worker of a model that it may load by itself when a request asks for it.

    Registered again with other values, it is forgotten first; one that is loaded serves on until it leaves.
    """

    model: str
    folder: str
    """Holds `config.json` and the safetensors files."""
    dtype: str | None = None
    """Dtype to compute in; None: the checkpoint's."""
    max_model_len: int | None = None


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model's files have changed or are gone: drop its plan and its image in host memory, and unregister it.

    One that is loaded serves on until it leaves.
    """

    model: str


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


class Prefetch(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Bring a registered model into host memory; answered by `Prefetched`."""

    model: str


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drop a model after its running requests end; answered by `ModelUnloaded`. Unknown models are answered too."""

    model: str


class KeepAlive(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Change how long a loaded model stays when idle."""

    model: str
    keep_alive_s: float


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run a request; answered by `Deltas` until every answer has a finish reason, or by `RequestFailed`.

    A model that was registered or loaded before is brought to the device where it is not there; the request waits.
    `model_not_found` says that the worker does not know the model and that nothing was generated.
    """

    request: EngineRequest
    keep_alive_s: float | None = None
    """How long the model stays when idle; None: as before."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop answers of a request; their last delta says `abort`. An unknown or finished request is ignored."""

    request_id: str
    index: int | None = None
    """Only this answer; None: all of the request's."""
    finish_reason: str = "abort"
    """What the last delta says: `stop` where a stop string was found in the text."""


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Say `Pong`: a worker whose loop hangs does not."""


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop now: running requests are failed."""


Command = Register | Forget | LoadModel | Prefetch | UnloadModel | KeepAlive | Generate | Abort | Ping | Shutdown


class WorkerReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker's first message."""

    pid: int
    device: str
    """For example `cpu` or `cuda:0`."""
    device_name: str
    total_bytes: int
    """Memory that weights and KV caches may take together."""
    host_bytes: int = 0
    """Host memory for models' images; 0: there is no host tier."""


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker's loop runs."""


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How far a load has come."""

    model: str
    phase: str
    """For example `read`."""
    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None = None
    """What the load has reached so far; None: it is too early to say."""


class ModelReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model runs requests; its last layers may still be on their way. Sent once for each load."""

    model: str
    weight_bytes: int
    kv_cache_bytes: int
    max_model_len: int
    dtype: str
    source: str
    """Tier that its bytes come from: `host` when all of it was there, else `disk`."""


class ModelLanded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Every byte of a model is on the device. Sent once for each load."""

    model: str
    source: str
    num_bytes: int
    """Bytes moved to the device."""
    disk_bytes: int
    """Of them, read from files."""
    host_bytes: int
    """Bytes of its image that stay in host memory."""
    reader: str
    """How files were read."""
    total_s: float
    """From the first who wanted it until now."""
    phase_seconds: dict[str, float]
    """Seconds by phase: `queue` (waiting for room), `plan`, `read` and others."""


class ModelLoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A load has failed. Sent once for each load that did, whoever waited for it; one that was unloaded did not."""

    model: str
    error: WireError


class ModelLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a `LoadModel`: every byte of the model is on the device."""

    model: str
    weight_bytes: int
    kv_cache_bytes: int
    num_kv_blocks: int
    block_size: int
    max_model_len: int
    dtype: str
    phase_seconds: dict[str, float]
    """Seconds by phase: `queue` (waiting for room), `plan`, `read` and others."""
    was_loaded: bool = False
    """It was there already."""


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a `LoadModel` that failed; whatever served before still serves."""

    model: str
    error: WireError


class Prefetched(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a `Prefetch`."""

    model: str
    host_bytes: int = 0
    """Bytes of the model that are in host memory."""
    image_bytes: int = 0
    """Bytes of all of it."""
    error: WireError | None = None


class ModelUnloaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A model has left the device."""

    model: str
    reason: str
    """`unload`, `keep_alive`, `evicted`, `failed` (a step went wrong) or `not_loaded`."""


class FirstToken(msgspec.Struct, frozen=True, array_like=True):
    """A request has its first tokens; all of them where it is not streamed."""

    request_id: str
    model: str
    tier: str
    """Where the model was when the request came."""
    waited_s: float
    """From then until the model was ready."""
    seconds: float
    """From then until now."""
    is_streamed: bool


class Deltas(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """New tokens of any number of answers, from one step of every engine."""

    deltas: list[SequenceDelta]
    first_tokens: list[FirstToken] = []


class RequestFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request ended without an answer."""

    request_id: str
    error: WireError


Event = (
    WorkerReady
    | Pong
    | LoadProgress
    | ModelReady
    | ModelLanded
    | ModelLoadFailed
    | ModelLoaded
    | LoadFailed
    | Prefetched
    | ModelUnloaded
    | Deltas
    | RequestFailed
    | Stats
)
