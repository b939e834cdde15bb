"""A form with a file (multipart/form-data, RFC 7578), written to disk as it comes: memory does not grow with it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from ..checkpoint.durable import disk_errors
from ..errors import RequestError

MAX_UPLOAD_BYTES = 512 * 1024**2
"""Largest form, file and fields together."""
MAX_FIELD_BYTES = 64 * 1024
"""Most bytes of all fields that are no file."""
STALL_TIMEOUT_S = 30.0
"""How long a client may pause while it sends."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """A form that has arrived whole; its file is synced to disk."""

    path: Path
    """Where the file is until the request ends; whoever wants to keep it moves it away."""
    filename: str
    fields: dict[str, str]
    """The form's other fields."""


async def body_chunks(receive: Receive) -> AsyncIterator[bytes]:
    """The body as it arrives; raises `RequestError` when the client leaves or stalls."""
    while True:
        try:
            async with asyncio.timeout(STALL_TIMEOUT_S):
                message = await receive()
        except TimeoutError as error:
            raise RequestError(f"nothing of the body arrived for {STALL_TIMEOUT_S:.0f} s") from error
        if message["type"] == "http.disconnect":
            raise RequestError("the client left before its body was read")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


@contextlib.asynccontextmanager
async def read_upload(
    chunks: AsyncIterator[bytes], content_type: str, path: Path, *, max_bytes: int = MAX_UPLOAD_BYTES
) -> AsyncIterator[Upload]:
    """Write the form's one file to `path` and yield the form; on exit the file goes, unless it was moved away.

    Raises:
        RequestError: Not such a form, no file or several, or too large.
        StoreError: The disk refuses.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise RequestError("content-type names no boundary of the form's parts", param="content-type")
    try:
        with disk_errors(path), open(path, "xb") as file:
            form = _Form(file, boundary)
            num_bytes = 0
            async for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise RequestError(f"the form is larger than {max_bytes} bytes; send less")
                await asyncio.to_thread(form.feed, chunk)
            await asyncio.to_thread(form.finish)
        yield Upload(path=path, filename=form.filename, fields=form.text_fields())
    finally:
        path.unlink(missing_ok=True)


class _Form:
    """Takes a form apart: the part called `file` goes to a file, the others into memory."""

    def __init__(self, file: IO[bytes], boundary: bytes) -> None:
        self.filename = ""
        self._file = file
        self._num_files = 0
        self._is_complete = False
        self._fields: dict[str, bytearray] = {}
        self._num_field_bytes = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._target: IO[bytes] | bytearray = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_part,
                    "on_part_data": self._take_data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise RequestError(f"content-type names a boundary that is none: {error}", param="content-type") from error

    def feed(self, chunk: bytes) -> None:
        """Take in the next bytes; blocks on the disk."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise RequestError(f"the body is not a form: {error}") from error

    def finish(self) -> None:
        """Check that the form was whole, and make its file durable."""
        if not self._is_complete:
            raise RequestError("the form ends before its last boundary; send it again")
        if self._num_files != 1:
            raise RequestError(f"the form has {self._num_files} parts called 'file', but it must have 1", param="file")
        self._file.flush()
        os.fsync(self._file.fileno())

    def text_fields(self) -> dict[str, str]:
        """Fields that are no file; raises `RequestError` for one that is not UTF-8."""
        try:
            return {name: value.decode() for name, value in self._fields.items()}
        except UnicodeDecodeError as error:
            raise RequestError(f"a field of the form is not UTF-8: {error}") from error

    def _end_header(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _begin_part(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._disposition = b""
        if name == "file":
            self._num_files += 1
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[-255:] or "file"
            self._target = self._file
        else:
            self._target = self._fields[name[:100]] = bytearray()

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if isinstance(self._target, bytearray):
            self._num_field_bytes += end - start
            if self._num_field_bytes > MAX_FIELD_BYTES:
                raise RequestError(f"the form's fields are larger than {MAX_FIELD_BYTES} bytes; send less")
            self._target.extend(data[start:end])
        else:
            self._target.write(data[start:end])

    def _end(self) -> None:
        self._is_complete = True
