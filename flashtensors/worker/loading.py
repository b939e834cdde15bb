"""What the worker and whoever loads models for it tell each other: plans, grants, loaded models, kept KV caches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..engine.loop import Engine
from ..residency.tiers import Demand
from ..step import RunnerLimits
from ..transfer.pipeline import LoadStats
from .messages import LoadModel, Register

Progress = Callable[[str, int, int], None]
"""Called with a phase, bytes done and bytes in all."""


class KeptKv(Protocol):
    """The KV cache of a model that left, with the engine that knows what is in it; for when the model comes back.

    A load that is given one owns it, whether it succeeds or fails.
    """

    @property
    def num_bytes(self) -> int:
        """Device memory that it holds."""
        ...

    def close(self) -> None:
        """Give the memory back; the model begins with an empty cache when it comes back."""
        ...


class CloseModel(Protocol):
    """Gives back what a model on the device holds."""

    def __call__(self, *, keeps_kv: bool = False) -> KeptKv | None:
        """Give the memory back, once; no load of the model is under way, and its engine is used no more.

        Args:
            keeps_kv: Keep its KV cache on the device, if the model is sound and such a cache can be used again.

        Returns:
            The cache that is kept; None: nothing is held any more.
        """
        ...


@dataclass(kw_only=True)
class LoadedModel:
    """A model on the device: its engine, and what must be given back when it leaves."""

    engine: Engine
    limits: RunnerLimits
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    """Of the device, as far as it can be handed out: whole handles on a GPU."""
    kv_cache_bytes: int
    dtype: str
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of the phases until requests could be started."""
    close: CloseModel

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.weight_bytes + self.kv_cache_bytes


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What one load may take."""

    kv_bytes: int
    """For the KV cache: a number of the demand's steps."""
    host_bytes: int = 0
    """What the model's image in the host tier may grow to."""
    kept: KeptKv | None = None
    """The model's own KV cache from its last life, of `kv_bytes`."""


OnReady = Callable[[LoadedModel], None]
"""Called in the loading thread when requests may be started."""


class PlannedModel(Protocol):
    """A model whose files are sound and whose size is known. It may be loaded any number of times, once at a time."""

    @property
    def demand(self) -> Demand:
        """Device memory that it wants."""
        ...

    @property
    def host_bytes(self) -> int:
        """Bytes of its complete image in the host tier; 0 where there is none."""
        ...

    def load(self, grant: Grant, progress: Progress, cancel: threading.Event, on_ready: OnReady) -> LoadStats:
        """Bring it to the device; returns when every byte is there.

        Args:
            grant: What it may take.
            progress: Told about bytes.
            cancel: Set it to make the load raise soon.
            on_ready: Called once, when all copies are queued: the runner waits on the device for each layer.

        Raises:
            CapacityError: No memory.
            CheckpointError: The files are not what they claim to be; `FileChanged`: no longer those that were planned.
            TransferError: A read or a copy failed, or the load was cancelled.
        Before `on_ready` nothing is held then; after it the owner closes the `LoadedModel`.
        """
        ...

    def fill(self, host_bytes: int, progress: Progress, cancel: threading.Event) -> LoadStats:
        """Read it into the host tier alone, where its image may grow to `host_bytes`; raises as `load`."""
        ...


class Loader(Protocol):
    """Plans models; a plan is made in a thread of its own."""

    def expect(self, command: Register | LoadModel) -> None:
        """A model became known, and may be planned and loaded some time; neither waits nor raises."""
        ...

    def plan(self, command: LoadModel) -> PlannedModel:
        """Check the files; raises `FlashError` where they are unsound or the wishes cannot be met."""
        ...

    def close(self) -> None:
        """Give back what is shared by all models; none is loaded any more."""
        ...
