"""Notes at the end of a memory file: the newest whole one counts, whatever a dying writer left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from flashtensors.errors import CapacityError
from flashtensors.memory.host_mapping import create_memory_file
from flashtensors.worker.host_index import INDEX_BYTES, SLOT_BYTES, HostIndex, IndexedImage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory files are Linux's")

CHUNK_BYTES = 4096
POOL_BYTES = 3 * 8192 + 4096  # ends in the middle of nothing special


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_memory_file(POOL_BYTES + INDEX_BYTES)
    yield fd
    os.close(fd)


def image(number: int) -> IndexedImage:
    return IndexedImage(f"plan {number}", {block: number * 10 + block for block in range(number)})


def test_a_new_file_holds_nothing(fd: int) -> None:
    index = HostIndex(fd, CHUNK_BYTES)
    assert index.read() == {}
    assert index.pool_bytes == POOL_BYTES


def test_the_last_note_is_found_by_the_next_process(fd: int) -> None:
    index = HostIndex(fd, CHUNK_BYTES)
    for number in range(1, 8):
        index.write({"m": image(number)})
        after = HostIndex(fd, CHUNK_BYTES)
        assert after.read() == {"m": image(number)}
    again = HostIndex(fd, CHUNK_BYTES)
    again.read()
    again.write({})
    assert HostIndex(fd, CHUNK_BYTES).read() == {}


@pytest.mark.parametrize("torn_bytes", [1, 8, 20, 40, 60])
def test_a_torn_note_leaves_the_one_before(fd: int, torn_bytes: int) -> None:
    index = HostIndex(fd, CHUNK_BYTES)
    index.write({"old": image(1)})
    index.write({"new": image(2)})
    newest = POOL_BYTES  # the second note, of an even number, is in the first slot
    before = os.pread(fd, torn_bytes, newest)
    os.pwrite(fd, bytes(byte ^ 0xFF for byte in before), newest)
    assert HostIndex(fd, CHUNK_BYTES).read() == {"old": image(1)}


def test_notes_of_other_pages_count_as_none(fd: int) -> None:
    HostIndex(fd, CHUNK_BYTES).write({"m": image(1)})
    assert HostIndex(fd, 2 * CHUNK_BYTES).read() == {}


def test_a_note_that_is_too_long_says_that_nothing_is_there(fd: int) -> None:
    index = HostIndex(fd, CHUNK_BYTES)
    index.write({"m": image(1)})
    index.write({"x" * SLOT_BYTES: image(1)})
    assert HostIndex(fd, CHUNK_BYTES).read() == {}


def test_pages_are_not_touched_by_notes(fd: int) -> None:
    os.pwrite(fd, b"\xaa" * POOL_BYTES, 0)
    index = HostIndex(fd, CHUNK_BYTES)
    for number in range(5):
        index.write({"m": image(number)})
    assert os.pread(fd, POOL_BYTES, 0) == b"\xaa" * POOL_BYTES


def test_a_file_without_room_for_pages_is_refused() -> None:
    fd = create_memory_file(INDEX_BYTES)
    with pytest.raises(CapacityError, match="mem_pool_size"):
        HostIndex(fd, CHUNK_BYTES)
    os.close(fd)
