"""Reads chunks of files only to check them: for weights that are used where they lie."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.chunk_digests import DIGEST_CHUNK_BYTES, DigestCheck
from .crew import Crew, Progress, ProgressTicker
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
    plan: LoadPlan,
    chunks: Iterable[Chunk],
    check: DigestCheck,
    *,
    num_threads: int,
    cancel: threading.Event,
    progress: Progress | None = None,
) -> None:
    """Read chunks of the plan's files through the page cache, where they are then, and check them.

    Args:
        plan: Whose files.
        chunks: Which of their chunks.
        check: Knows or learns their digests.
        num_threads: Threads that read.
        cancel: Set it to make this raise soon.
        progress: Called on the caller's thread with bytes done and bytes in all: at the beginning, a few times a
            second, and at the end.

    Raises:
        DigestMismatch: A chunk is not what it was.
        FileChanged, CheckpointError, TruncatedFile, TransferError: As `pipeline.load`.
    """
    unread = deque(sorted(chunks))
    if not unread:
        return
    sizes = {(path, offset): min(DIGEST_CHUNK_BYTES, plan.files[path].num_bytes - offset) for path, offset in unread}
    total_bytes, done_bytes = sum(sizes.values()), list[int]()
    ticker = ProgressTicker(progress, total_bytes, lambda: sum(done_bytes))
    if progress is not None:
        progress(0, total_bytes)

    def work(crew: Crew) -> None:
        buffer = memoryview(bytearray(DIGEST_CHUNK_BYTES))
        while not crew.is_stopping:
            try:
                path, offset = unread.popleft()
            except IndexError:  # the others took the rest
                return
            data = buffer[: sizes[path, offset]]
            reader.read_into(path, offset, data)
            check.check(path, offset, data)
            done_bytes.append(len(data))

    with BufferedReader(plan.files) as reader, Crew(min(num_threads, len(unread)), work, cancel) as crew:
        crew.wait_for(lambda: crew.is_done and not unread, ticker)
    ticker.finish()
