"""`/health`, `/ready` and `/metrics`."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from .context import Call
from .responses import json_response


async def health(call: Call) -> Response:
    """200 while the process answers."""
    return json_response({"status": "ok"})


async def ready(call: Call) -> Response:
    """200 while requests are taken and a worker is there to run them; else 503."""
    state = "draining" if call.server.drain.is_draining else call.server.models.supervisor.state
    return json_response({"status": state}, 200 if state == "ready" else 503)


async def metrics(call: Call) -> Response:
    """Prometheus' text format."""
    return Response(call.server.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})
