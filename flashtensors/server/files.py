"""Uploaded and produced files on disk, as the Files API shows them.

A file is two: `<id>.data`, and `<id>.json`, which is written last and durably, so that what is listed is whole. Bytes
on their way in are in a `.partial` file, which nobody sees and the next start removes.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path

import msgspec

from ..checkpoint.durable import disk_errors, replace_file
from ..errors import ObjectNotFound

_FILE_ID = re.compile(r"file-[0-9a-f]{32}")


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file; times are Unix seconds."""

    id: str
    num_bytes: int
    created_at: int
    created_ns: int = 0
    """The same in nanoseconds, which puts those of one second in order; 0: an older version made it."""
    filename: str
    purpose: str
    """`batch` for input, `batch_output` for results."""
    expires_at: int | None = None


class FileStore:
    """The files of one store. Methods may be called from any thread; those that touch the disk block.

    Args:
        folder: Made when absent; only one process may have it open.
        clock: Unix seconds.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._records: dict[str, FileRecord] = {}
        self._num_users: collections.Counter[str] = collections.Counter()

    def open(self, keep: Collection[str] = ()) -> None:
        """Read what is there, and remove what a crash left half-made, except the bytes of the ids in `keep`."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in self._folder.glob("*.json"):
                record = msgspec.json.decode(path.read_bytes(), type=FileRecord)
                self._records[record.id] = record
            for path in self._folder.iterdir():
                is_orphan = path.suffix == ".data" and path.stem not in self._records and path.stem not in keep
                if is_orphan or path.suffix in (".partial", ".scratch"):
                    path.unlink()
        self.remove_expired()

    def new_partial(self) -> Path:
        """A name for bytes on their way in."""
        return self._folder / f"{uuid.uuid4().hex}.partial"

    def publish(
        self,
        source: Path,
        *,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        file_id: str | None = None,
    ) -> FileRecord:
        """Make a file of `source`, which is synced to disk already and moves into the store.

        With a `file_id` it may be repeated after a crash: bytes that have moved already are taken as they are.
        """
        self.remove_expired()
        file_id = file_id or f"file-{uuid.uuid4().hex}"
        if file_id in self._records:
            return self._records[file_id]
        data_path, now_s = self._data_path(file_id), self._clock()
        with disk_errors(data_path):
            with contextlib.suppress(FileNotFoundError):
                os.replace(source, data_path)
            record = FileRecord(
                id=file_id,
                num_bytes=data_path.stat().st_size,
                created_at=int(now_s),
                filename=filename,
                purpose=purpose,
                expires_at=None if expires_after_s is None else int(now_s) + expires_after_s,
                created_ns=int(now_s * 1e9),
            )
            replace_file(self._record_path(file_id), msgspec.json.encode(record), self._folder / f"{file_id}.scratch")
        self._records[file_id] = record
        return record

    def get(self, file_id: str) -> FileRecord:
        """What is known of a file; raises `ObjectNotFound`."""
        record = self._records.get(file_id) if _FILE_ID.fullmatch(file_id) else None
        if record is None or self._is_expired(record):
            raise ObjectNotFound(f"there is no file {file_id[:100]!r}, or it has expired; see GET /v1/files")
        return record

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are; raises `ObjectNotFound`."""
        return self._data_path(self.get(file_id).id)

    def list(self) -> list[FileRecord]:
        """All files, newest first."""
        records = [record for record in list(self._records.values()) if not self._is_expired(record)]
        return sorted(records, key=lambda record: (-record.created_at, -record.created_ns, record.id))

    def remove(self, file_id: str) -> None:
        """Remove a file; raises `ObjectNotFound`."""
        self._remove(self.get(file_id))

    def hold(self, file_id: str) -> None:
        """Keep a file beyond its time, until as many have let go of it."""
        self._num_users[file_id] += 1

    def let_go(self, file_id: str) -> None:
        """End a `hold`."""
        self._num_users[file_id] -= 1

    def remove_expired(self) -> None:
        """Remove files whose time is over; until then they are only hidden."""
        for record in list(self._records.values()):
            if self._is_expired(record):
                self._remove(record)

    def _remove(self, record: FileRecord) -> None:
        with disk_errors(self._folder):
            self._record_path(record.id).unlink(missing_ok=True)
            self._data_path(record.id).unlink(missing_ok=True)
        self._records.pop(record.id, None)

    def _is_expired(self, record: FileRecord) -> bool:
        is_over = record.expires_at is not None and record.expires_at <= self._clock()
        return is_over and not self._num_users[record.id]

    def _data_path(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.data"

    def _record_path(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.json"


def derived_file_id(text: str) -> str:
    """An id that is the same whenever it is made of the same text."""
    return f"file-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
