"""Results of a batch while it runs: two growing files from which a new daemon sees what is done.

A line is appended in one write. After a crash the last one may be torn; it is cut off, and its request runs again. So
each request has one line, in one of the files, whenever the daemon dies.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ...checkpoint.durable import disk_errors
from ...closing import Closing
from ...errors import FlashError
from ..responses import openai_error_body
from .input import line_digest

SYNC_EVERY_S = 2.0
"""Seconds of results that a power failure may cost; they are computed again."""

_OTHER_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")
"""What JSON leaves as it is, and `str.splitlines`, with which many read result files, ends a line at."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one request, as one line of a result file."""

    custom_id: str
    text: bytes
    is_error: bool


class _CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None


class _Body(msgspec.Struct, frozen=True):
    usage: _Usage | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Body | None = None


class _Line(msgspec.Struct, frozen=True):
    """What is counted of a line that was written."""

    custom_id: str
    response: _Response | None = None


def answered(custom_id: str, request_id: str, body: object) -> Result:
    """A request that was answered."""
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return _result(custom_id, {"response": response, "error": None}, is_error=False)


def refused(custom_id: str, request_id: str, error: FlashError) -> Result:
    """A request that the server refused or could not answer."""
    body = msgspec.Raw(openai_error_body(error))
    response = {"status_code": error.http_status, "request_id": request_id, "body": body}
    return _result(custom_id, {"response": response, "error": None}, is_error=True)


def never_run(custom_id: str, code: str, message: str) -> Result:
    """A request that was not run at all."""
    return _result(custom_id, {"response": None, "error": {"code": code, "message": message}}, is_error=True)


def _result(custom_id: str, fields: dict[str, object], *, is_error: bool) -> Result:
    head = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id}
    text = msgspec.json.encode({**head, **fields})
    for end, escaped in _OTHER_LINE_ENDS:
        text = text.replace(end, escaped)
    return Result(custom_id=custom_id, text=text + b"\n", is_error=is_error)


class ResultLog(Closing):
    """The two result files of one batch; opening them finds what was done before. Methods block.

    Args:
        output_path: Answers.
        error_path: Requests without one.

    Raises:
        StoreError: The disk refuses, here and in every method.
    """

    def __init__(self, output_path: Path, error_path: Path) -> None:
        self._done: set[bytes] = set()
        self._num_tokens = {"num_input_tokens": 0, "num_cached_tokens": 0, "num_output_tokens": 0}
        self._paths = (output_path, error_path)
        self.num_completed = self._recover(output_path)
        """Requests that were answered."""
        self.num_failed = self._recover(error_path)
        """Requests that were not."""
        self._fds: list[int] = []
        with disk_errors(output_path):
            for path in self._paths:
                self._fds.append(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
        self._synced_s = time.monotonic()

    def counts(self) -> dict[str, int]:
        """What its record says of the results so far, by field."""
        return {"num_completed": self.num_completed, "num_failed": self.num_failed, **self._num_tokens}

    def has(self, custom_id: str) -> bool:
        """Whether a request has its result."""
        return line_digest(custom_id) in self._done

    def append(self, results: Sequence[Result]) -> None:
        """Add results; they survive the end of this process, and soon that of the machine."""
        for is_error, fd, path in zip((False, True), self._fds, self._paths, strict=True):
            chosen = [result for result in results if result.is_error == is_error]
            if chosen:
                with disk_errors(path):
                    _append_whole(fd, b"".join(result.text for result in chosen))
                for result in chosen:
                    self._take_in(result.text)
                self._count(len(chosen), is_error=is_error)
        if time.monotonic() - self._synced_s > SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Make all results durable."""
        for fd, path in zip(self._fds, self._paths, strict=True):
            with disk_errors(path):
                os.fsync(fd)
        self._synced_s = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def _count(self, num: int, *, is_error: bool) -> None:
        if is_error:
            self.num_failed += num
        else:
            self.num_completed += num

    def _recover(self, path: Path) -> int:
        """Take in the whole lines of a file and cut off what follows them; returns how many there are."""
        num_lines, num_bytes = 0, 0
        with disk_errors(path), contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            for text in file:
                if not self._take_in(text):
                    break
                num_lines, num_bytes = num_lines + 1, num_bytes + len(text)
            file.truncate(num_bytes)
        return num_lines

    def _take_in(self, text: bytes) -> bool:
        """Count a line and its tokens; False for a torn one."""
        if not text.endswith(b"\n"):
            return False
        try:
            line = msgspec.json.decode(text, type=_Line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        self._done.add(line_digest(line.custom_id))
        body = None if line.response is None else line.response.body
        if body is not None and (usage := body.usage) is not None:
            cached = usage.prompt_tokens_details
            self._num_tokens["num_input_tokens"] += usage.prompt_tokens
            self._num_tokens["num_cached_tokens"] += 0 if cached is None else cached.cached_tokens
            self._num_tokens["num_output_tokens"] += usage.completion_tokens
        return True


def _append_whole(fd: int, data: bytes) -> None:
    """Append all, or raise and leave the file as it was."""
    num_bytes_before, view = os.fstat(fd).st_size, memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.ftruncate(fd, num_bytes_before)
        raise
