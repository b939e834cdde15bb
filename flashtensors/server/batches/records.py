"""What is known of a batch, and its place on disk.

    validating ─▶ in_progress ─▶ finalizing ─▶ completed
         └▶ failed     │  └ window over ─▶ finalizing ─▶ expired
                       └ cancel ─▶ cancelling ─▶ cancelled

`outcome` is written before result files are published and says that every line has its result, or that there will be
no more (`failed`): a daemon that dies then publishes again, and never computes again. A batch whose input is lost while
it runs fails too, and keeps what was answered.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from ...checkpoint.durable import disk_errors, replace_file
from ...errors import ObjectNotFound

FINAL_STATUSES = frozenset({"failed", "completed", "expired", "cancelled"})
_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch was refused: one finding in its input file."""

    code: str
    message: str
    line: int | None = None
    """Counted from 1; None: the file as a whole."""
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a batch; times are Unix seconds."""

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    created_ns: int = 0
    """The same in nanoseconds, which puts those of one second in order; 0: an older version made it."""
    expires_at: int
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    status: str = "validating"
    outcome: str | None = None
    """The final status, once no more results will come."""
    errors: list[LineError] = []
    num_total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    model: str | None = None
    """What all requests ask; None before they were read, and where they ask several."""
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in FINAL_STATUSES


class BatchStore:
    """Records of batches and their unfinished results, in one folder. Methods that touch the disk block.

    Args:
        folder: Made when absent; only one process may have it open.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[str, BatchRecord] = {}

    def open(self) -> None:
        """Read what is there."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for path in self._folder.glob("batch_*.json"):
                record = msgspec.json.decode(path.read_bytes(), type=BatchRecord)
                self._records[record.id] = record

    def save(self, record: BatchRecord) -> None:
        """Make a record durable; one caller at a time for each batch."""
        path = self._folder / f"{record.id}.json"
        with disk_errors(path):
            replace_file(path, msgspec.json.encode(record), path.with_suffix(".scratch"))

    def show(self, record: BatchRecord) -> None:
        """Let `get` find a record."""
        self._records[record.id] = record

    def get(self, batch_id: str) -> BatchRecord:
        """The batch of that id; raises `ObjectNotFound`."""
        record = self._records.get(batch_id) if _BATCH_ID.fullmatch(batch_id) else None
        if record is None:
            raise ObjectNotFound(f"there is no batch {batch_id[:100]!r}; see GET /v1/batches")
        return record

    def list(self) -> list[BatchRecord]:
        """All batches, newest first."""
        return sorted(self._records.values(), key=lambda record: (-record.created_at, -record.created_ns, record.id))

    def output_path(self, batch_id: str) -> Path:
        """Where results are collected until the batch ends."""
        return self._folder / f"{batch_id}.output.jsonl"

    def error_path(self, batch_id: str) -> Path:
        """Where failed requests are collected until the batch ends."""
        return self._folder / f"{batch_id}.errors.jsonl"
