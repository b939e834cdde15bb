"""What a worker reports of its models and its memory."""

from __future__ import annotations

import msgspec


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
    num_generated: int = 0
    """Tokens of answers since the load, whether handed out yet or not."""


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the bytes of a model are that is not on disk alone."""

    model: str
    tier: str
    """The fastest tier that holds all of it: `disk`, `host` or `device`."""
    state: str
    """`absent`, `loading`, `ready` or `unloading`: on its way to the device and back."""
    host_bytes: int
    """Bytes of its image in host memory."""
    image_bytes: int
    """Of the whole image; 0: not known yet, or there is no host tier."""
    kept_kv_bytes: int = 0
    """Bytes of the KV cache that it left on the device."""
    num_parked: int = 0
    """Requests that wait until it is ready."""


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent about once a second while there is work, when it ends, and after every change of what is loaded."""

    models: list[ModelStats]
    loading: list[str]
    free_bytes: int
    """Of the device's budget; kept KV caches are not free."""
    whereabouts: list[Whereabouts] = []
    host_bytes: int = 0
    """Host memory for images."""
    host_free_bytes: int = 0
    kept_kv_bytes: int = 0
    """Bytes of KV caches that models left on the device."""
    hits: dict[str, int] = {}
    """Requests since the start of the worker, by the tier that their model was in when they came."""
    link_bytes_per_s: float | None = None
    """What loads from host memory reached lately; None: there was none to measure."""
    disk_bytes_per_s: float | None = None
    """What loads from disk reached lately; None: there was none to measure."""
    at_s: float = 0.0
    """When it was made, by the worker's clock: only the time between two reports means anything."""
