"""The arena: views share its bytes, offsets are checked, memory outlives `close` while a view does."""

from __future__ import annotations

import pytest
import torch

from flashtensors.errors import CapacityError
from flashtensors.memory.arena import ALIGNMENT, Arena, align


def test_align_rounds_up():
    assert [align(size) for size in (0, 1, 255, 256, 257)] == [0, 256, 256, 256, 512]


def test_host_memory_is_zero_and_page_aligned():
    with Arena.allocate(10_000) as arena:
        assert arena.num_bytes == 10_000
        assert arena.bytes_B.data_ptr() % 4096 == 0
        assert not arena.bytes_B.any()


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float32, (3, 5)), (torch.bfloat16, ()), (torch.bool, (7,)), (torch.float64, (0, 4))]
)
def test_view_shares_the_arenas_bytes(dtype: torch.dtype, shape: tuple[int, ...]):
    with Arena.allocate(1024) as arena:
        view = arena.view(ALIGNMENT, shape, dtype)
        assert view.shape == shape
        assert view.dtype == dtype
        assert view.numel() == 0 or view.data_ptr() == arena.bytes_B.data_ptr() + ALIGNMENT
        view.fill_(1)
        expected = torch.ones(shape, dtype=dtype).reshape(-1).view(torch.uint8)
        end = ALIGNMENT + expected.numel()
        assert torch.equal(arena.bytes_B[ALIGNMENT:end], expected)
        assert not arena.bytes_B[:ALIGNMENT].any()
        assert not arena.bytes_B[end:].any()


def test_write_copies_any_layout():
    source = torch.arange(12.0).view(3, 4).t()
    with Arena.allocate(256) as arena:
        arena.write(0, source)
        assert torch.equal(arena.view(0, (4, 3), torch.float32), source)


def test_host_memory_is_what_views_see():
    with Arena.allocate(512) as arena:
        arena.host_memory()[256:260] = b"\x01\x00\x00\x00"
        assert arena.view(256, (1,), torch.int32).item() == 1


@pytest.mark.parametrize(("offset", "num_elements"), [(1, 1), (256, 65), (-256, 1), (512, 1)])
def test_view_outside_the_arena_is_our_bug(offset: int, num_elements: int):
    with Arena.allocate(512) as arena, pytest.raises(AssertionError):
        arena.view(offset, (num_elements,), torch.float32)


def test_views_outlive_close():
    arena = Arena.allocate(4096)
    view = arena.view(0, (4,), torch.int64)
    view.fill_(7)
    arena.close()
    arena.close()
    assert view.tolist() == [7, 7, 7, 7]
    with pytest.raises(AssertionError, match="closed"):
        arena.view(0, (4,), torch.int64)


def test_empty_arena():
    with Arena.allocate(0) as arena:
        assert arena.view(0, (0, 3), torch.float16).shape == (0, 3)


@pytest.mark.parametrize("num_bytes", [2**60, 2**80])
def test_no_room_is_a_capacity_error(num_bytes: int):
    with pytest.raises(CapacityError, match="no room"):
        Arena.allocate(num_bytes)


@pytest.mark.gpu
def test_device_arena():
    with Arena.allocate(1024, "cuda") as arena:
        arena.write(256, torch.arange(4.0))
        assert arena.view(256, (4,), torch.float32).tolist() == [0, 1, 2, 3]
