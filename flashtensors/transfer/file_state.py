"""What a file looked like when its header was read, to notice one that was replaced before it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """Size and time of change of a file."""

    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The state of the file at `path` now."""
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(num_bytes=status.st_size, modified_ns=status.st_mtime_ns)
