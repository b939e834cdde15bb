"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from ...checkpoint.catalog import ModelRecord
from ..context import Call
from ..responses import json_response


async def list_models(call: Call) -> Response:
    """Every model in the store, loaded or not: any of them may be asked for."""
    records = await asyncio.to_thread(call.server.models.catalog.list)
    return json_response({"object": "list", "data": [_model(call, record, record.name) for record in records]})


async def retrieve_model(call: Call) -> Response:
    """One model; the id is echoed as it was asked for."""
    record = await asyncio.to_thread(call.server.models.catalog.get, call.model_param)
    return json_response(_model(call, record, call.model_param))


def _model(call: Call, record: ModelRecord, model_id: str) -> dict[str, object]:
    return {
        "id": model_id,
        "object": "model",
        "created": int(record.created_unix_s),
        "owned_by": "flashtensors",
        "flashtensors": {
            "state": call.server.models.state_of(record),
            "num_bytes": record.num_bytes,
            "context_length": record.max_position_embeddings,
            "model_type": record.model_type,
            "dtype": record.dtype,
            "source": record.source,
            "revision": record.revision,
            "aliases": list(record.aliases),
        },
    }
