"""The host pool: pages never cross an edge of a registration, none is lent twice, and what fails is said."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashtensors.errors import CapacityError, TransferError
from flashtensors.memory import host_pool, host_segments
from flashtensors.memory.host_mapping import HostMapping, create_memory_file
from flashtensors.memory.host_pool import PAGE_SLACK_BYTES, HostPool, Page
from flashtensors.memory.host_segments import cut_segments

CHUNK_BYTES = 8192
PAGE_BYTES = CHUNK_BYTES + PAGE_SLACK_BYTES


class FakePinning:
    """Remembers what is registered; refuses ranges longer than `max_bytes`."""

    def __init__(self, max_bytes: int = 2**62) -> None:
        self.max_bytes = max_bytes
        self.ranges: dict[int, int] = {}
        self._lock = threading.Lock()

    def register(self, address: int, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise TransferError(f"{num_bytes} bytes are too many")
        with self._lock:
            assert all(address + num_bytes <= at or at + size <= address for at, size in self.ranges.items())
            self.ranges[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.ranges[address]

    def holds(self, page: Page) -> bool:
        start = page.bytes_B.data_ptr()
        return any(at <= start and start + len(page.buffer) <= at + size for at, size in self.ranges.items())


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few pages, as a large pool has them."""
    monkeypatch.setattr(host_pool, "SEGMENT_BYTES", 5 * PAGE_BYTES)
    monkeypatch.setattr(host_segments, "MIN_SEGMENT_BYTES", PAGE_BYTES)
    monkeypatch.setattr(host_segments, "SLICE_BYTES", 2 * PAGE_BYTES)


@given(st.integers(0, 10_000), st.integers(1, 64).map(lambda pages: pages * 4096), st.integers(1, 2**27))
def test_segments_are_whole_pages_end_to_end(num_pages: int, page_bytes: int, segment_bytes: int):
    end = 0
    for segment in cut_segments(num_pages * page_bytes, page_bytes, segment_bytes):
        assert segment.offset == end
        assert segment.num_bytes > 0
        assert segment.num_bytes % page_bytes == 0
        assert segment.num_bytes <= max(segment_bytes, page_bytes)
        end += segment.num_bytes
    assert end == num_pages * page_bytes


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("max_pages", [100, 3, 1])
def test_every_page_lies_in_one_registration(max_pages: int):
    pinning = FakePinning(max_pages * PAGE_BYTES)
    with HostPool(23 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=pinning, num_threads=3) as pool:
        assert pool.wait(timeout_s=30)
        pages = pool.allocate_up_to(100)
        assert len(pages) == 23
        assert all(page.is_pinned for page in pages)
        assert all(pinning.holds(page) for page in pages)
        assert all(page.bytes_B.data_ptr() % 4096 == 0 for page in pages)
        assert pool.pinned_bytes == pool.num_bytes == sum(pinning.ranges.values())
        assert (pool.pinning_problem is None) == (max_pages == 100)
    assert not pinning.ranges


@pytest.mark.usefixtures("small_segments")
def test_memory_that_cannot_be_pinned_is_used_all_the_same():
    with HostPool(7 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=FakePinning(0), num_threads=2) as pool:
        assert pool.wait(timeout_s=30)
        assert [page.is_pinned for page in pool.allocate_up_to(9)] == [False] * 7
        assert pool.pinned_bytes == 0
        assert pool.pinning_problem is not None
        assert "too many" in pool.pinning_problem


def test_pages_hold_what_is_written():
    with HostPool(3 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES) as pool:
        pages = pool.allocate_up_to(3)
        for page in pages:
            page.buffer[:] = bytes([page.index + 1]) * PAGE_BYTES
        assert [page.bytes_B.unique().tolist() for page in pages] == [[page.index + 1] for page in pages]
        assert pool.allocate() is None


class SlowPinning(FakePinning):
    """Registers one range, and the others once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def register(self, address: int, num_bytes: int) -> None:
        if self.ranges:
            assert self.go_on.wait(30)
        super().register(address, num_bytes)


@pytest.mark.usefixtures("small_segments")
def test_the_first_segment_can_be_used_before_the_others_are_ready():
    pinning = SlowPinning()
    with HostPool(20 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=pinning, num_threads=1) as pool:
        assert pool.wait(2 * PAGE_BYTES, timeout_s=30)
        assert not pool.wait(timeout_s=0.01)
        assert [page.index for page in pool.allocate_up_to(9)] == [0, 1, 2, 3, 4]
        assert pool.free_bytes == 15 * PAGE_BYTES
        pinning.go_on.set()
        page = pool.allocate()
        assert page is not None
        assert page.index == 5
        assert pool.wait(timeout_s=30)


@pytest.mark.usefixtures("small_segments")
def test_no_more_is_made_during_a_load_than_it_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_pool, "READY_BYTES", 5 * PAGE_BYTES)
    pinning = SlowPinning()
    with HostPool(40 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=pinning, num_threads=1) as pool:
        assert pool.wait(1, timeout_s=30)
        with pool.go_first():
            pinning.go_on.set()  # what has begun is finished
            assert not pool.wait(timeout_s=0.2)
            made_bytes = pool.ready_bytes
            assert len(pool.allocate_up_to(made_bytes // PAGE_BYTES)) * PAGE_BYTES == made_bytes
            assert pool.allocate() is not None, "the load gets what it asks for"
        assert pool.wait(timeout_s=30)


@pytest.mark.usefixtures("small_segments")
def test_closing_while_the_pool_is_made_leaves_nothing_registered():
    pinning = SlowPinning()
    pool = HostPool(50 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=pinning, num_threads=2)
    assert pool.wait(1, timeout_s=30)
    pinning.go_on.set()
    pool.close()
    assert not pinning.ranges
    assert pool.allocate() is None


def test_another_mapping_of_a_memory_file_finds_the_pages_again():
    fd = create_memory_file(4 * PAGE_BYTES)
    try:
        with HostPool(4 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, fd=fd) as pool:
            page = pool.allocate_up_to(3)[2]
            page.buffer[:5] = b"bytes"
        with HostPool(4 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, fd=fd) as pool:
            again = pool.claim(page.index)
            assert bytes(again.buffer[:5]) == b"bytes"
            with pytest.raises(CapacityError, match=f"page {page.index} .* is not free"):
                pool.claim(page.index)
            with pytest.raises(CapacityError, match="page 9 "):
                pool.claim(9)
            assert len(pool.allocate_up_to(9)) == 3
    finally:
        os.close(fd)


def test_reserved_pages_wait_for_who_knows_what_they_hold():
    fd = create_memory_file(5 * PAGE_BYTES)
    try:
        with HostPool(5 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, fd=fd) as pool:
            pages = pool.allocate_up_to(5)
            for page in pages:
                page.buffer[0] = page.index + 1
        with HostPool(5 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, fd=fd, reserved=[1, 3, 4]) as pool:
            pool.wait()
            assert pool.free_bytes == 2 * PAGE_BYTES
            others = [page.index for page in pool.allocate_up_to(5)]
            assert others == [0, 2]
            assert pool.allocate() is None
            claimed = pool.claim(3)
            assert claimed.buffer[0] == 4
            pool.free_reserved([1, 4])
            assert pool.free_bytes == 2 * PAGE_BYTES
            assert sorted(page.index for page in pool.allocate_up_to(5)) == [1, 4]
            pool.give_back(claimed)
            assert pool.free_bytes == PAGE_BYTES
    finally:
        os.close(fd)


def test_a_closed_pool_gives_its_memory_back_at_once():
    num_mappings = Path("/proc/self/maps").read_text(encoding="utf-8").count("flashtensors-pool")
    fd = create_memory_file(2 * PAGE_BYTES)
    gc.disable()
    try:
        with HostPool(2 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, fd=fd) as pool:
            pool.give_back(pool.claim(1))
        assert Path("/proc/self/maps").read_text(encoding="utf-8").count("flashtensors-pool") == num_mappings
    finally:
        gc.enable()
        os.close(fd)


def test_memory_outlives_the_pool_while_a_page_is_used():
    pool = HostPool(PAGE_BYTES, chunk_bytes=CHUNK_BYTES)
    page = pool.allocate()
    assert page is not None
    pool.close()
    page.bytes_B.fill_(3)
    assert page.bytes_B.unique().tolist() == [3]


@pytest.mark.parametrize("num_bytes", [2**60, PAGE_BYTES - 1])
def test_a_size_that_cannot_be_is_a_capacity_error(num_bytes: int):
    with pytest.raises(CapacityError):
        HostPool(num_bytes, chunk_bytes=CHUNK_BYTES)


def test_a_memory_file_of_a_length_that_cannot_be_is_a_capacity_error():
    with pytest.raises(CapacityError):
        create_memory_file(2**64)


def test_running_out_of_memory_reaches_who_waits(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: HostMapping, offset: int, num_bytes: int) -> None:
        raise CapacityError("the system has no room")

    monkeypatch.setattr(HostMapping, "touch", refuse)
    with HostPool(PAGE_BYTES, chunk_bytes=CHUNK_BYTES) as pool:
        with pytest.raises(CapacityError, match="no room"):
            pool.wait(timeout_s=30)
        assert pool.allocate() is None


@pytest.mark.usefixtures("small_segments")
def test_an_error_that_nobody_expected_reaches_who_waits_too():
    class Broken(FakePinning):
        def register(self, address: int, num_bytes: int) -> None:
            raise RuntimeError("CUDA error: unspecified launch failure")

    with HostPool(23 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=Broken(), num_threads=2) as pool:
        with pytest.raises(TransferError, match="unspecified launch failure"):
            pool.wait(timeout_s=30)
        assert pool.allocate() is None, "nobody waits for what never comes"


def test_touching_keeps_what_memory_holds():
    mapping = HostMapping(1 << 20)
    mapping.bytes_B[5000] = 9
    mapping.touch(4096, 8192)
    assert mapping.bytes_B[5000] == 9
    assert mapping.bytes_B.sum() == 9


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a set of free indexes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = HostPool(6 * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, num_threads=1)
        self.pool.wait()
        self.owned: list[Page] = []

    @rule()
    def allocate(self) -> None:
        page = self.pool.allocate()
        assert (page is None) == (len(self.owned) == 6)
        if page is not None:
            self.owned.append(page)

    @rule(num_pages=st.integers(0, 8))
    def allocate_several(self, num_pages: int) -> None:
        pages = self.pool.allocate_up_to(num_pages)
        assert len(pages) == min(num_pages, 6 - len(self.owned))
        self.owned += pages

    @rule(index=st.integers(0, 5))
    def claim(self, index: int) -> None:
        if index in [page.index for page in self.owned]:
            with pytest.raises(CapacityError):
                self.pool.claim(index)
        else:
            self.owned.append(self.pool.claim(index))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.pool.give_back(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def no_page_is_lent_twice(self) -> None:
        indexes = [page.index for page in self.owned]
        assert len(set(indexes)) == len(indexes)
        assert self.pool.free_bytes == (6 - len(indexes)) * PAGE_BYTES
        assert len({page.bytes_B.data_ptr() for page in self.owned}) == len(indexes)

    def teardown(self) -> None:
        self.pool.close()


TestPoolMachine = PoolMachine.TestCase


@pytest.mark.gpu
def test_a_registered_pool_is_pinned_memory():
    from flashtensors.memory.pinning import find_pinning

    with HostPool(64 << 20, chunk_bytes=1 << 20, pinning=find_pinning("cuda")) as pool:
        pool.wait()
        assert pool.pinning_problem is None
        page = pool.allocate()
        assert page is not None
        assert page.bytes_B.is_pinned()
        page.bytes_B.fill_(7)
        assert torch.equal(page.bytes_B.cuda().cpu(), page.bytes_B)
        torch.cuda.synchronize()
    assert not page.bytes_B.is_pinned()
