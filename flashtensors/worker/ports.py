"""What `ResidentModels` needs of others: images in host memory, and whoever has the requests."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ..errors import FlashError
from .loading import LoadedModel


class Images(Protocol):
    """Models in host memory; see `host_tier.HostTier`."""

    capacity_bytes: int

    def names(self) -> Collection[str]:
        """Models of which something is held."""
        ...

    def held_bytes(self, model: str) -> int:
        """Bytes that `model` holds."""
        ...

    def trim(self, model: str, keep_bytes: int) -> int:
        """Free the last layers beyond `keep_bytes`; returns what is still held."""
        ...

    def drop(self, model: str) -> None:
        """Free all that `model` holds."""
        ...


class RequestHome(Protocol):
    """Who has the requests that wait for models, and those that run."""

    def start_request(self, request_id: str, loaded: LoadedModel) -> None:
        """The request has a lease on its model: run it, and release the lease once."""
        ...

    def refuse_request(self, request_id: str, error: FlashError) -> None:
        """The request has waited in vain."""
        ...

    def fail_requests(self, model: str, error: FlashError) -> None:
        """Nothing that runs on the model can go on; return the leases."""
        ...
