"""`POST /api/pull`."""

from __future__ import annotations

import contextlib

from starlette.responses import Response

from ..bodies import parse_body
from ..context import Call
from ..responses import NDJSON, json_response, open_stream
from .schema import UNSUPPORTED_IN_PULL, PullRequest


async def pull_model(call: Call) -> Response:
    """Bring a model into the store, with reports on the way unless `stream` is false."""
    body = parse_body(call.body, PullRequest, UNSUPPORTED_IN_PULL)
    pull_call = body.call()
    call.server.pulls.check(pull_call)
    reports = call.server.pulls.follow(pull_call)
    if body.stream:
        return await open_stream(reports, NDJSON)
    last: dict[str, object] = {}
    async with contextlib.aclosing(reports):
        async for report in reports:
            last = report
    return json_response(last)
