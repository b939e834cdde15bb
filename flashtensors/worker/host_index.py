"""Which pages of the host pool hold what, noted in the memory file itself: a worker that starts again is hot again.

The daemon keeps the memory file open while workers come and go. Its last bytes are two slots; each note goes to the
slot of the older one, so a worker that dies while it writes leaves the note before readable.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping

import msgspec
import xxhash

from ..errors import CapacityError

SLOT_BYTES = 1024**2
INDEX_BYTES = 2 * SLOT_BYTES
"""What the index takes of the memory file."""

_HEADER = struct.Struct("<8sQQQ")  # magic, number of the note, bytes of the note, XXH3 of the note
_MAGIC = b"flashidx"


class IndexedImage(msgspec.Struct, frozen=True):
    """What one model has in the pool."""

    identity: str
    """Of the plan that its pages were read for."""
    pages: dict[int, int]
    """Index of the page of each block that is there."""


class _Note(msgspec.Struct, frozen=True):
    chunk_bytes: int
    images: dict[str, IndexedImage]


class HostIndex:
    """The notes in one memory file. One thread at a time uses it.

    Args:
        fd: The memory file, a whole number of memory pages long and longer than `INDEX_BYTES`; borrowed while the
            constructor runs.
        chunk_bytes: Of the pool; notes of a pool of other pages are as good as none.

    Raises:
        CapacityError: The file is too short, or the system does not map it.
    """

    def __init__(self, fd: int, chunk_bytes: int) -> None:
        num_bytes = os.fstat(fd).st_size
        if num_bytes <= INDEX_BYTES:
            raise CapacityError(f"a memory file of {num_bytes} bytes holds no pool; give it more (mem_pool_size)")
        self.pool_bytes = num_bytes - INDEX_BYTES
        """What the file has for pages, before the index."""
        self._chunk_bytes = chunk_bytes
        granularity = mmap.ALLOCATIONGRANULARITY
        start = self.pool_bytes // granularity * granularity
        try:
            memory = mmap.mmap(fd, num_bytes - start, offset=start)
        except (OSError, ValueError) as error:
            raise CapacityError(f"the system does not map the end of the host pool's memory file: {error}") from error
        self._slots = memoryview(memory)[self.pool_bytes - start :]
        self._number = 0

    def read(self) -> dict[str, IndexedImage]:
        """The newest whole note, by model; empty where there is none."""
        notes = [note for slot in range(2) if (note := self._read_slot(slot)) is not None]
        if not notes:
            return {}
        self._number, newest = max(notes, key=lambda note: note[0])
        return newest.images if newest.chunk_bytes == self._chunk_bytes else {}

    def write(self, images: Mapping[str, IndexedImage]) -> None:
        """Replace the note. One that does not fit says that nothing is there."""
        data = msgspec.msgpack.encode(_Note(self._chunk_bytes, dict(images)))
        if len(data) > SLOT_BYTES - _HEADER.size:
            data = msgspec.msgpack.encode(_Note(self._chunk_bytes, {}))
        self._number += 1
        start = self._number % 2 * SLOT_BYTES
        self._slots[start + _HEADER.size : start + _HEADER.size + len(data)] = data
        header = _HEADER.pack(_MAGIC, self._number, len(data), xxhash.xxh3_64_intdigest(data))
        self._slots[start : start + _HEADER.size] = header

    def _read_slot(self, slot: int) -> tuple[int, _Note] | None:
        start = slot * SLOT_BYTES
        magic, number, num_bytes, digest = _HEADER.unpack_from(self._slots, start)
        data = self._slots[start + _HEADER.size : start + _HEADER.size + num_bytes]
        if magic != _MAGIC or len(data) != num_bytes or xxhash.xxh3_64_intdigest(data) != digest:
            return None
        try:
            return number, msgspec.msgpack.decode(data, type=_Note)
        except msgspec.DecodeError:  # of another version
            return None
