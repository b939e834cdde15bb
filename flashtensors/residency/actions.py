"""What the residency machine tells its owner to do, and to answer."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FlashError


@dataclass(frozen=True)
class StartLoad:
    """Read the model's headers and report `planned` or `load_failed`."""

    model: str


@dataclass(frozen=True)
class AdmitLoad:
    """Memory is reserved: read the weights, build the rest, and report `loaded` or `load_failed`."""

    model: str
    flexible_bytes: int
    """Bytes that the KV cache may take."""


@dataclass(frozen=True)
class Drop:
    """Free all that is held for the model and report `unloaded`; nothing runs on it."""

    model: str


@dataclass(frozen=True)
class AnswerLoad:
    """Answer one load."""

    ticket: int
    model: str
    was_loaded: bool = False
    """The model was there already, or another load of it is answered at the same time."""
    error: FlashError | None = None


@dataclass(frozen=True)
class ReportUnload:
    """Tell that the model has left; the answer to an unload where there is a ticket."""

    ticket: int | None
    model: str
    reason: str
    """`unload`, `keep_alive`, `evicted`, `failed` or `not_loaded`."""


Action = StartLoad | AdmitLoad | Drop | AnswerLoad | ReportUnload
