"""sha256 of files, several at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import StoreError

_CHUNK_BYTES = 4 * 1024**2
_MAX_THREADS = 8  # one thread hashes about 1 GB/s; hashlib releases the GIL


def hash_file(
    path: Path,
    on_bytes: Callable[[int], None] | None = None,
    *,
    on_piece: Callable[[memoryview], None] | None = None,
    is_synced: bool = False,
) -> str:
    """Hexadecimal sha256 of a file.

    Args:
        path: The file.
        on_bytes: Told the size of every piece that was hashed.
        on_piece: Given every piece, in order; valid until it returns.
        is_synced: Also make the file durable; the hashed bytes are then those that survive a crash.

    Raises:
        StoreError: The file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while num_bytes := file.readinto(buffer):
                digest.update(buffer[:num_bytes])
                if on_piece is not None:
                    on_piece(buffer[:num_bytes])
                if on_bytes is not None:
                    on_bytes(num_bytes)
            if is_synced:
                os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; check the disk and the permissions") from error
    return digest.hexdigest()


def hash_files(
    paths: Sequence[Path],
    on_bytes: Callable[[int], None] | None = None,
    *,
    on_pieces: Mapping[Path, Callable[[memoryview], None]] | None = None,
    is_synced: bool = False,
) -> list[str]:
    """`hash_file` of each path, in the order given; the first error ends the rest."""
    pieces = on_pieces or {}
    if not paths:
        return []
    num_threads = min(len(paths), _MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="hash") as executor:
        futures = [
            executor.submit(hash_file, path, on_bytes, on_piece=pieces.get(path), is_synced=is_synced) for path in paths
        ]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
