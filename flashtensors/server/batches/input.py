"""The input file of a batch: every line checked before the first is run, none of them kept in memory.

What is wrong with a line as such (JSON, ids, route, model) refuses the batch. What is wrong with a request's fields is
that request's own result, as it is when it comes alone.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

import msgspec

from ...checkpoint.durable import disk_errors
from ...errors import FlashError
from ..bodies import MAX_BODY_BYTES
from .records import LineError

MAX_LINES = 100_000
"""Most requests in one batch."""
MAX_ERRORS = 100
"""Findings after which a file is read no further."""
MAX_CUSTOM_ID_CHARS = 512
PIECE_LINES, PIECE_BODY_BYTES = 100, 1024**2
"""Lines of one piece of a file, at most, and bytes of bodies after which it ends."""


class BatchLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of a batch."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class _ModelField(msgspec.Struct, frozen=True):
    model: str


def line_digest(custom_id: str) -> bytes:
    """16 bytes that stand for an id in sets of very many."""
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class BatchInput:
    """Where the lines of a sound input file are, by model.

    Args:
        path: The file.
        offsets: By model, in the order of their first lines: byte offset of each line.
    """

    def __init__(self, path: Path, offsets: dict[str, array[int]]) -> None:
        self._path, self._offsets = path, offsets
        self.num_lines = sum(map(len, offsets.values()))
        self.only_model = next(iter(offsets)) if len(offsets) == 1 else None
        """What all lines ask; None where they ask several."""

    def pieces(self, is_done: Callable[[str], bool]) -> Generator[list[BatchLine]]:
        """Read the lines whose id is not done, model by model, so that models swap as often as there are models.

        Blocks; raises `StoreError` where the disk refuses.
        """
        piece, num_body_bytes = list[BatchLine](), 0
        with disk_errors(self._path), self._path.open("rb") as file:
            for offset in itertools.chain(*self._offsets.values()):
                file.seek(offset)
                line = msgspec.json.decode(file.readline(), type=BatchLine)
                if is_done(line.custom_id):
                    continue
                piece.append(line)
                num_body_bytes += len(line.body)
                if len(piece) == PIECE_LINES or num_body_bytes >= PIECE_BODY_BYTES:
                    yield piece
                    piece, num_body_bytes = [], 0
        if piece:
            yield piece


class InputChecker:
    """Checks one input file line by line.

    Args:
        endpoint: The route that every line must name.
        check_model: Raises `FlashError` for a model that cannot be asked; called once for each name.
    """

    def __init__(self, endpoint: str, check_model: Callable[[str], object]) -> None:
        self.errors: list[LineError] = []
        """What was found."""
        self._endpoint, self._check_model = endpoint, check_model
        self._model_errors: dict[str, FlashError | None] = {}
        self._digests: set[bytes] = set()
        self._offsets: dict[str, array[int]] = {}

    def check(self, path: Path) -> BatchInput | None:
        """Read the file; None when `errors` says why it is refused."""
        with disk_errors(path), path.open("rb") as file:
            self._check_lines(file)
        if not self.errors and not self._digests:
            self.errors.append(LineError(code="empty_file", message="the input file holds no requests"))
        return None if self.errors else BatchInput(path, self._offsets)

    def _check_lines(self, file: IO[bytes]) -> None:
        number, offset = 0, 0
        while (text := file.readline(MAX_BODY_BYTES + 1)) and len(self.errors) < MAX_ERRORS:
            number += 1
            if len(text) > MAX_BODY_BYTES:
                self._refuse(number, "line_too_long", f"the line is longer than {MAX_BODY_BYTES} bytes")
                return
            if not text.isspace():
                self._check_line(number, offset, text)
            if len(self._digests) > MAX_LINES:
                self._refuse(number, "too_many_requests", f"a batch may hold {MAX_LINES} requests; split the file")
                return
            offset += len(text)

    def _check_line(self, number: int, offset: int, text: bytes) -> None:
        try:
            line = msgspec.json.decode(text, type=BatchLine)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(number, "invalid_json_line", f"the line is not a request in JSON: {error}")
            return
        self._check_id(number, line.custom_id)
        if line.method != "POST":
            self._refuse(number, "invalid_method", f"method is {line.method[:50]!r}, but it must be POST", "method")
        if line.url != self._endpoint:
            self._refuse(
                number, "invalid_url", f"url is {line.url[:100]!r}, but the batch's endpoint is {self._endpoint}", "url"
            )
        model = self._find_model(number, line.body)
        if model is not None:
            self._offsets.setdefault(model, array("q")).append(offset)

    def _check_id(self, number: int, custom_id: str) -> None:
        digest = line_digest(custom_id)
        if not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
            allowed = f"between 1 and {MAX_CUSTOM_ID_CHARS}"
            self._refuse(number, "invalid_custom_id", f"custom_id must have {allowed} characters", "custom_id")
        elif digest in self._digests:
            text = f"custom_id {custom_id[:100]!r} stands in an earlier line too; each must be unique"
            self._refuse(number, "duplicate_custom_id", text, "custom_id")
        self._digests.add(digest)

    def _find_model(self, number: int, body: msgspec.Raw) -> str | None:
        try:
            model = msgspec.json.decode(body, type=_ModelField).model
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(number, "missing_model", f"body names no model: {error}", "body.model")
            return None
        if model not in self._model_errors:
            self._model_errors[model] = _error_of(self._check_model, model)
        refused = self._model_errors[model]
        if refused is not None:
            self._refuse(number, refused.code, refused.message, "body.model")
        return None if refused is not None else model

    def _refuse(self, number: int, code: str, message: str, param: str | None = None) -> None:
        self.errors.append(LineError(code=code, message=f"line {number}: {message}", line=number, param=param))


def _error_of(check: Callable[[str], object], model: str) -> FlashError | None:
    try:
        check(model)
    except FlashError as error:
        return error
    return None
