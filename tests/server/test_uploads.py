"""Forms with a file, in whatever pieces they arrive."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from flashtensors.errors import FlashError, RequestError
from flashtensors.server import uploads
from flashtensors.server.uploads import Upload, body_chunks, read_upload

DATA = b'{"custom_id": "a"}\r\n--not a boundary--\r\n' + bytes(range(256)) * 5


def form_of(files: list[tuple[str, tuple[str, bytes]]], **fields: str) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://x", files=files, data=fields)
    return request.read(), request.headers["content-type"]


def read(body: bytes, content_type: str, path: Path, *, piece: int = 1000, **options: int) -> tuple[Upload, bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    async def run() -> tuple[Upload, bytes]:
        async with read_upload(pieces(), content_type, path, **options) as upload:
            return upload, path.read_bytes()

    return asyncio.run(run())


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 10**6])
def test_a_form_comes_apart_whatever_pieces_it_comes_in(tmp_path: Path, piece: int) -> None:
    body, content_type = form_of([("file", ("näme.jsonl", DATA))], purpose="batch", other="é")
    upload, data = read(body, content_type, tmp_path / "x", piece=piece)
    assert data == DATA
    assert (upload.filename, upload.fields) == ("näme.jsonl", {"purpose": "batch", "other": "é"})
    assert not (tmp_path / "x").exists()


BODY, CONTENT_TYPE = form_of([("file", ("a", DATA))], purpose="batch")


@pytest.mark.parametrize(
    ("body", "content_type", "match"),
    [
        (BODY, "multipart/form-data", "no boundary"),
        (BODY, "multipart/form-data; boundary=other", "not a form"),
        (BODY[: len(BODY) // 2], CONTENT_TYPE, "ends before"),
        (b"", CONTENT_TYPE, "ends before"),
        (b"{}", CONTENT_TYPE, "not a form"),
        (*form_of([("other", ("a", DATA))]), "has 0 parts"),
        (*form_of([("file", ("a", b"1")), ("file", ("b", b"2"))]), "has 2 parts"),
        (*form_of([("file", ("a", b"1"))], purpose="x" * 70_000), "fields are larger"),
        (BODY.replace(b"batch", b"\xff\xfe"), CONTENT_TYPE, "not UTF-8"),
    ],
)
def test_what_is_no_such_form_is_refused_and_leaves_nothing(
    tmp_path: Path, body: bytes, content_type: str, match: str
) -> None:
    with pytest.raises(RequestError, match=match):
        read(body, content_type, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_is_too_large_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="larger than 100 bytes"):
        read(BODY, CONTENT_TYPE, tmp_path / "x", piece=50, max_bytes=100)


def test_a_client_that_leaves_or_stalls_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "STALL_TIMEOUT_S", 0.01)

    async def leave() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def stall() -> dict[str, object]:
        await asyncio.Event().wait()
        return {}

    async def consume(receive: object) -> None:
        async for _ in body_chunks(receive):  # pyright: ignore
            pass

    for receive in (leave, stall):
        with pytest.raises(FlashError, match=r"left|arrived"):
            asyncio.run(consume(receive))
