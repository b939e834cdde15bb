"""`/v1/batches`: create, list, look up, cancel."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.responses import Response

from ...errors import RequestError
from ..batches.records import BatchRecord
from ..bodies import Unsupported, parse_body
from ..context import Call
from ..responses import json_response
from .batch_lines import ENDPOINTS
from .files import check_expiry
from .paging import page_body

_UNSUPPORTED: Unsupported = {}
_TIMES = (
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class ExpiresAfter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When result files go."""

    anchor: str
    seconds: int


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    def check(self) -> None:
        """Raise `RequestError` for a route that is not served, or labels that are too many or too long."""
        if self.endpoint not in ENDPOINTS:
            text = f"endpoint is {self.endpoint[:100]!r}, but it must be one of {', '.join(ENDPOINTS)}"
            raise RequestError(text, param="endpoint")
        labels = self.metadata or {}
        if len(labels) > 16 or any(len(name) > 64 or len(value) > 512 for name, value in labels.items()):
            raise RequestError("metadata may hold 16 pairs of at most 64 and 512 characters", param="metadata")

    @property
    def output_expires_after_s(self) -> int | None:
        """Seconds that result files stay; None: until they are deleted."""
        wanted = self.output_expires_after
        return None if wanted is None else check_expiry(wanted.anchor, wanted.seconds, "output_expires_after")


class NoFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of a request that says all in its path."""


async def create_batch(call: Call) -> Response:
    """Begin a batch over an uploaded file."""
    body = parse_body(call.body, BatchRequest, _UNSUPPORTED)
    body.check()
    record = await call.server.batches.create(
        body.input_file_id,
        body.endpoint,
        metadata=body.metadata,
        output_expires_after_s=body.output_expires_after_s,
    )
    return json_response(batch_body(record))


async def list_batches(call: Call) -> Response:
    """Batches, newest first."""
    records = call.server.batches.list()
    return json_response(
        page_body(
            records,
            call.query_params,
            default_limit=20,
            max_limit=100,
            id_of=lambda record: record.id,
            body_of=batch_body,
        )
    )


async def retrieve_batch(call: Call) -> Response:
    """One batch as it is now."""
    return json_response(batch_body(call.server.batches.get(call.path_params["batch_id"])))


async def cancel_batch(call: Call) -> Response:
    """Stop a batch; requests that were answered keep their answers."""
    if call.body:
        parse_body(call.body, NoFields, _UNSUPPORTED)
    return json_response(batch_body(await call.server.batches.cancel(call.path_params["batch_id"])))


def batch_body(record: BatchRecord) -> dict[str, object]:
    """A batch in OpenAI's shape."""
    return {
        "id": record.id,
        "object": "batch",
        "endpoint": record.endpoint,
        "errors": {"object": "list", "data": record.errors} if record.errors else None,
        "input_file_id": record.input_file_id,
        "completion_window": "24h",
        "status": record.status,
        "output_file_id": record.output_file_id,
        "error_file_id": record.error_file_id,
        "created_at": record.created_at,
        **{name: getattr(record, name) for name in _TIMES},
        "request_counts": {
            "total": record.num_total,
            "completed": record.num_completed,
            "failed": record.num_failed,
        },
        "usage": _usage_body(record),
        "model": record.model,
        "metadata": record.metadata,
    }


def _usage_body(record: BatchRecord) -> dict[str, object]:
    """Tokens of the requests that were answered so far."""
    return {
        "input_tokens": record.num_input_tokens,
        "input_tokens_details": {"cached_tokens": record.num_cached_tokens},
        "output_tokens": record.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": record.num_input_tokens + record.num_output_tokens,
    }
