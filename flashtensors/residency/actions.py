"""What the residency machine tells its owner to do, and to answer. The owner obeys in the order given."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import FlashError
from .tiers import Tier


@dataclass(frozen=True)
class StartPlan:
    """Read the model's headers and report `planned` or `failed`."""

    model: str


@dataclass(frozen=True)
class AdmitLoad:
    """Memory is reserved: load the model; report `ready` and then `landed`, or `failed` at any time."""

    model: str
    flexible_bytes: int
    """Bytes that the KV cache may take."""
    host_bytes: int = 0
    """Bytes that the model's image in host memory may grow to."""
    uses_kept_kv: bool = False
    """The KV cache of the model's last life is there, and takes exactly `flexible_bytes`."""
    source: Tier = Tier.DISK
    """`HOST` when the whole image is in host memory."""
    waited_s: float = field(default=0.0, compare=False)
    """Since the first who wants it came."""


@dataclass(frozen=True)
class Fill:
    """Read the model into host memory, up to `host_bytes`, and report `filled` or `failed`."""

    model: str
    host_bytes: int


@dataclass(frozen=True)
class StopFill:
    """End a fill soon and keep what it has read; it is reported as any fill."""

    model: str


@dataclass(frozen=True)
class TrimHost:
    """Free the tail of an image now, so that at most `keep_bytes` of it stay."""

    model: str
    keep_bytes: int


@dataclass(frozen=True)
class Forget:
    """Drop the model's plan and its image now: its files have changed or are gone."""

    model: str


@dataclass(frozen=True)
class Drop:
    """Free all that is held on the device for the model and report `dropped`; nothing runs on it."""

    model: str
    keeps_kv: bool = False
    """Hold on to the KV cache and report its size."""


@dataclass(frozen=True)
class DropKept:
    """Free the kept KV cache of a model that has left, now."""

    model: str


@dataclass(frozen=True)
class StartRequest:
    """The request has a lease on the model: run it, and report `finish` once."""

    ticket: str
    model: str


@dataclass(frozen=True)
class RefuseRequest:
    """Answer the request with an error; it has no lease."""

    ticket: str
    model: str
    error: FlashError


@dataclass(frozen=True)
class AnswerLoad:
    """Answer one load."""

    ticket: int
    model: str
    was_loaded: bool = False
    """The model was there already, or another load of it is answered at the same time."""
    error: FlashError | None = None


@dataclass(frozen=True)
class AnswerFill:
    """Answer one prefetch."""

    ticket: int
    model: str
    host_bytes: int = 0
    """Bytes of the model that are in host memory."""
    error: FlashError | None = None


@dataclass(frozen=True)
class ReportUnload:
    """Tell that the model has left; the answer to an unload where there is a ticket."""

    ticket: int | None
    model: str
    reason: str
    """`unload`, `keep_alive`, `evicted`, `failed` or `not_loaded`."""


Action = (
    StartPlan
    | AdmitLoad
    | Fill
    | StopFill
    | TrimHost
    | Forget
    | Drop
    | DropKept
    | StartRequest
    | RefuseRequest
    | AnswerLoad
    | AnswerFill
    | ReportUnload
)
