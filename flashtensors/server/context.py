"""What every route of one daemon shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import Settings
from ..errors import InvalidName
from .batches.jobs import BatchJobs
from .drain import Drain
from .files import FileStore
from .metrics import Metrics
from .models import ModelManager
from .pulls import Pulls
from .uploads import Upload


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerContext:
    """The daemon's parts, made once in `app.build_app`'s caller."""

    settings: Settings
    models: ModelManager
    metrics: Metrics
    pulls: Pulls
    drain: Drain
    files: FileStore
    batches: BatchJobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One admitted HTTP request, its body read and bounded."""

    server: ServerContext
    request_id: str
    """The client's `x-request-id`, or ours; echoed in the answer."""
    body: bytes
    path_params: Mapping[str, str]
    query_params: Mapping[str, str]
    upload: Upload | None = None
    """The form, on routes that take one; `body` is empty then."""

    @property
    def model_param(self) -> str:
        """The model named in the path."""
        name = self.path_params.get("model", "")
        if not name:
            raise InvalidName("the path names no model")
        return name
