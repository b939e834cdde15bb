"""Changes to the store that survive a crash, and its disk errors by name."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import DiskFull, StoreError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise `DiskFull` or `StoreError` that names `path` where the block raises `OSError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{path}: no room left on its file system; free some and pull again") from error
        where = error.filename or path
        raise StoreError(f"{where}: {error.strerror or error}; check the store's disk and permissions") from error


def replace_file(path: Path, data: bytes, scratch: Path) -> None:
    """Make `path` hold `data`, at once and durably: after a crash it holds the old bytes or the new.

    Args:
        path: The file.
        data: Its bytes.
        scratch: A name on the same file system that nobody else uses.
    """
    with open(scratch, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder with all it holds; one that is not there is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
