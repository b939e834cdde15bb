"""What a file looked like when its header was read, to notice one that was replaced before it was loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """Size and time of change of a file, and which file it is: a copy put in its place may have both."""

    num_bytes: int
    modified_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """The state of the file at `path` now."""
        try:
            return cls.of_status(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error

    @classmethod
    def of_status(cls, status: os.stat_result) -> Self:
        """The state that the system tells of a file."""
        return cls(num_bytes=status.st_size, modified_ns=status.st_mtime_ns, inode=status.st_ino)
