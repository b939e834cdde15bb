"""`/v1/files`: upload, list, look up, read, delete."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from ...errors import RequestError, UnsupportedField
from ..context import Call
from ..files import FileRecord
from ..responses import FileDownload, json_response
from .paging import page_body

MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 86400
"""Range of `expires_after[seconds]`."""
_MAX_LISTED = 10_000


async def create_file(call: Call) -> Response:
    """Take in an uploaded file."""
    assert call.upload is not None, "the route takes an upload"
    fields = dict(call.upload.fields)
    purpose = fields.pop("purpose", None)
    if purpose != "batch":
        raise UnsupportedField(f"purpose is {purpose!r}, but this server takes 'batch' only", param="purpose")
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    if fields:
        raise RequestError(f"unknown field {next(iter(fields))!r}", param=next(iter(fields)))
    record = await asyncio.to_thread(
        call.server.files.publish,
        call.upload.path,
        filename=call.upload.filename,
        purpose=purpose,
        expires_after_s=_expiry_s(anchor, seconds),
    )
    return json_response(file_body(record))


async def list_files(call: Call) -> Response:
    """Files, newest first unless `order=asc`, of one `purpose` where it is given."""
    query, records = call.query_params, call.server.files.list()
    if "purpose" in query:
        records = [record for record in records if record.purpose == query["purpose"]]
    if query.get("order", "desc") not in ("asc", "desc"):
        raise RequestError(f"order is {query['order'][:20]!r}, but it must be asc or desc", param="order")
    if query.get("order") == "asc":
        records.reverse()
    return json_response(
        page_body(
            records,
            query,
            default_limit=_MAX_LISTED,
            max_limit=_MAX_LISTED,
            id_of=lambda record: record.id,
            body_of=file_body,
        )
    )


async def retrieve_file(call: Call) -> Response:
    """What is known of one file."""
    return json_response(file_body(call.server.files.get(call.path_params["file_id"])))


async def read_file(call: Call) -> Response:
    """The bytes of one file."""
    files = call.server.files
    record = files.get(call.path_params["file_id"])
    return FileDownload(files.path(record.id), media_type="application/octet-stream", filename=record.filename)


async def delete_file(call: Call) -> Response:
    """Remove a file that no unfinished batch reads."""
    file_id = call.path_params["file_id"]
    call.server.batches.check_unused(file_id)
    await asyncio.to_thread(call.server.files.remove, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def file_body(record: FileRecord) -> dict[str, object]:
    """A file in OpenAI's shape."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.num_bytes,
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",
    }


def check_expiry(anchor: str, seconds: int, param: str) -> int:
    """Seconds of an `expires_after`; raises `RequestError` for what OpenAI does not allow either."""
    if anchor != "created_at":
        raise RequestError(f"{param}.anchor is {anchor[:50]!r}, but it must be created_at", param=param)
    if not MIN_EXPIRY_S <= seconds <= MAX_EXPIRY_S:
        raise RequestError(
            f"{param}.seconds is {seconds}, but it must be between {MIN_EXPIRY_S} and {MAX_EXPIRY_S}", param=param
        )
    return seconds


def _expiry_s(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor is None or seconds is None or not (seconds.isascii() and seconds.isdecimal()):
        raise RequestError("expires_after needs an anchor and a number of seconds", param="expires_after")
    return check_expiry(anchor, int(seconds[:12]), "expires_after")
