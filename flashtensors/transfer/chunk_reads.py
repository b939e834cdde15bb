"""Reads chunks of files only to check them: for weights that are used where they lie."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.chunk_digests import DIGEST_CHUNK_BYTES, DigestCheck
from .crew import Crew, ProgressTicker
from .load_plan import Extent, LoadPlan
from .readers.buffered import BufferedReader

Chunk = tuple[Path, int]
"""A file, and the byte that the chunk begins at: a multiple of `DIGEST_CHUNK_BYTES`."""


def find_chunks(extents: Iterable[Extent]) -> set[Chunk]:
    """The chunks that `extents` lie in."""
    return {
        (extent.path, index * DIGEST_CHUNK_BYTES)
        for extent in extents
        if extent.num_bytes > 0
        for index in range(
            extent.file_offset // DIGEST_CHUNK_BYTES,
            (extent.file_offset + extent.num_bytes - 1) // DIGEST_CHUNK_BYTES + 1,
        )
    }


def check_chunks(
    plan: LoadPlan, chunks: Iterable[Chunk], check: DigestCheck, *, num_threads: int, cancel: threading.Event
) -> None:
    """Read chunks of the plan's files through the page cache, where they are then, and check them.

    Raises:
        DigestMismatch: A chunk is not what it was.
        FileChanged, CheckpointError, TruncatedFile, TransferError: As `pipeline.load`.
    """
    unread = deque(sorted(chunks))
    if not unread:
        return
    ticker = ProgressTicker(None, 0, lambda: 0)

    def work(crew: Crew) -> None:
        buffer = memoryview(bytearray(DIGEST_CHUNK_BYTES))
        while not crew.is_stopping:
            try:
                path, offset = unread.popleft()
            except IndexError:  # the others took the rest
                return
            data = buffer[: min(DIGEST_CHUNK_BYTES, plan.files[path].num_bytes - offset)]
            reader.read_into(path, offset, data)
            check.check(path, offset, data)

    with BufferedReader(plan.files) as reader, Crew(min(num_threads, len(unread)), work, cancel) as crew:
        crew.wait_for(lambda: crew.is_done and not unread, ticker)
