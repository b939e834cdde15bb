"""Arenas over remapped memory: the same addresses with other weights behind them, on the host and on a device."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from flashtensors.errors import CapacityError
from flashtensors.memory import weight_arena
from flashtensors.memory.device_pool import DevicePool, MemoryDriver, choose_handle_bytes
from flashtensors.memory.host_driver import HostMemoryDriver
from flashtensors.memory.weight_arena import WeightArena

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mapping memory at fixed addresses is Linux's")

HANDLE_BYTES = 64 * 1024


def make_host_pool(num_handles: int) -> DevicePool:
    return DevicePool(HostMemoryDriver(), num_handles * HANDLE_BYTES, handle_bytes=HANDLE_BYTES)


def test_two_models_take_turns_at_one_address():
    with make_host_pool(4) as pool, WeightArena(pool, 3 * HANDLE_BYTES - 100, signature="s") as arena:
        arena.map()
        weights = arena.view(256, (5,), torch.float32)
        weights.copy_(torch.arange(5.0))
        address = weights.data_ptr()
        arena.unmap()
        assert pool.free_bytes == 4 * HANDLE_BYTES
        arena.map()
        assert weights.data_ptr() == address
        weights.fill_(7)
        assert arena.view(256, (5,), torch.float32).tolist() == [7] * 5
        assert arena.num_bytes == 3 * HANDLE_BYTES - 100
        assert arena.mapped_bytes == 3 * HANDLE_BYTES


def test_memory_moves_between_arenas():
    with make_host_pool(2) as pool, WeightArena(pool, HANDLE_BYTES * 2) as left, WeightArena(pool, 100) as right:
        left.map()
        left.bytes_B.fill_(1)
        with pytest.raises(CapacityError, match="has 0 free handles"):
            right.map()
        assert not right.is_mapped
        left.unmap()
        right.map()
        right.bytes_B.fill_(2)
        assert right.bytes_B.unique().tolist() == [2]


def test_all_of_the_range_is_memory():
    with make_host_pool(3) as pool, WeightArena(pool, 3 * HANDLE_BYTES) as arena:
        arena.map()
        expected = torch.randint(0, 256, (3 * HANDLE_BYTES,), dtype=torch.uint8)
        arena.write(0, expected)
        assert torch.equal(arena.bytes_B, expected)


def test_what_was_captured_goes_with_the_arena():
    with make_host_pool(1) as pool:
        arena = WeightArena(pool, 10)
        arena.map()
        arena.captured["step of 8"] = object()
        arena.unmap()
        assert "step of 8" in arena.captured
        arena.close()
        arena.close()
        assert not arena.captured


def test_misuse_is_our_bug():
    with make_host_pool(2) as pool, WeightArena(pool, 10) as arena:
        with pytest.raises(AssertionError, match="never been mapped"):
            _ = arena.bytes_B
        arena.map()
        with pytest.raises(AssertionError, match="is mapped"):
            arena.map()
        with pytest.raises(AssertionError, match="still mapped"):
            pool.close()


class FaultyDriver(HostMemoryDriver):
    """Maps nothing, or creates only so many handles."""

    def __init__(self, num_handles: int) -> None:
        super().__init__()
        self.num_left = num_handles

    def create(self, num_bytes: int) -> int:
        if self.num_left == 0:
            raise CapacityError("the device has no memory")
        self.num_left -= 1
        return super().create(num_bytes)


def test_a_device_with_less_than_was_promised_lends_nothing():
    with DevicePool(FaultyDriver(2), 4 * HANDLE_BYTES, handle_bytes=HANDLE_BYTES) as pool:
        with pytest.raises(CapacityError, match="no memory"):
            pool.take(3)
        assert pool.free_bytes == 4 * HANDLE_BYTES
        handles = pool.take(2)
        pool.give_back(handles)


def test_a_thousand_swaps_take_no_more_memory():
    with (
        make_host_pool(2) as pool,
        WeightArena(pool, HANDLE_BYTES) as left,
        WeightArena(pool, HANDLE_BYTES * 2) as right,
    ):
        for _ in range(500):
            for arena in (left, right):
                arena.map()
                arena.bytes_B[0] = 1
                arena.unmap()
        assert pool.free_bytes == 2 * HANDLE_BYTES
        assert pool.trim() == 2 * HANDLE_BYTES, "two handles served them all"


def test_the_beginning_of_a_long_range_may_have_memory():
    with make_host_pool(4) as pool, WeightArena(pool, 1000 * HANDLE_BYTES) as arena:
        arena.map(HANDLE_BYTES + 1)
        assert arena.mapped_bytes == 2 * HANDLE_BYTES
        everything = arena.bytes_B
        assert everything.numel() == 1000 * HANDLE_BYTES
        everything[: 2 * HANDLE_BYTES].fill_(3)
        arena.unmap()
        arena.map(4 * HANDLE_BYTES)
        assert arena.bytes_B is everything
        everything[: 4 * HANDLE_BYTES].fill_(4)
        assert pool.free_bytes == 0
        arena.unmap()
        arena.map(0)
        assert not arena.is_mapped


def test_memory_moves_with_what_it_holds():
    with (
        make_host_pool(3) as pool,
        WeightArena(pool, 2 * HANDLE_BYTES) as left,
        WeightArena(pool, 9 * HANDLE_BYTES) as right,
    ):
        left.map()
        expected = torch.randint(0, 256, (2 * HANDLE_BYTES,), dtype=torch.uint8)
        left.write(0, expected)
        handles = left.detach()
        assert not left.is_mapped
        assert pool.free_bytes == HANDLE_BYTES, "the handles are the taker's"
        right.attach(handles)
        assert torch.equal(right.bytes_B[: 2 * HANDLE_BYTES], expected)
        right.unmap()
        assert pool.free_bytes == 3 * HANDLE_BYTES


def test_a_mapping_that_fails_half_way_is_undone():
    class HalfDriver(HostMemoryDriver):
        num_mapped = 0

        def _map(self, address: int, num_bytes: int, protection: int, flags: int, fd: int) -> int:
            if fd >= 0:
                self.num_mapped += 1
                if self.num_mapped == 3:
                    raise CapacityError("no more")
            return super()._map(address, num_bytes, protection, flags, fd)

    pool = DevicePool(HalfDriver(), 4 * HANDLE_BYTES, handle_bytes=HANDLE_BYTES)
    with pool, WeightArena(pool, 4 * HANDLE_BYTES) as arena:
        with pytest.raises(CapacityError, match="no more"):
            arena.map()
        assert pool.free_bytes == 4 * HANDLE_BYTES
        arena.map()
        arena.bytes_B.fill_(1)


class NotingDriver(HostMemoryDriver):
    """Notes how many handles are behind an arena's addresses, and refuses where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.mapped: dict[int, int] = {}
        self.refuses = False

    def map(self, address: int, handles: list[int], handle_bytes: int) -> None:
        if self.refuses:
            raise CapacityError("no more")
        super().map(address, handles, handle_bytes)
        self.mapped[address] = len(handles)

    def unmap(self, address: int, num_handles: int, handle_bytes: int) -> None:
        super().unmap(address, num_handles, handle_bytes)
        assert self.mapped.pop(address) == num_handles


def test_memory_comes_in_parts_as_it_is_reached(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_arena, "PART_BYTES", 2 * HANDLE_BYTES)
    driver = NotingDriver()
    pool = DevicePool(driver, 7 * HANDLE_BYTES, handle_bytes=HANDLE_BYTES)
    with pool, WeightArena(pool, 7 * HANDLE_BYTES) as arena:
        for _ in range(2):
            arena.map(in_parts=True)
            assert pool.free_bytes == 0, "nobody else can take what is mapped later"
            assert arena.mapped_bytes == 7 * HANDLE_BYTES
            assert [*driver.mapped.values()] == [2]
            arena.reach(0, 2 * HANDLE_BYTES)
            assert [*driver.mapped.values()] == [2]
            arena.reach(6 * HANDLE_BYTES + 5, 6 * HANDLE_BYTES + 6)
            assert [*driver.mapped.values()] == [2, 1]
            driver.refuses = True
            with pytest.raises(CapacityError, match="no more"):
                arena.reach(2 * HANDLE_BYTES - 1, 3 * HANDLE_BYTES)
            driver.refuses = False
            expected = torch.randint(0, 256, (5 * HANDLE_BYTES,), dtype=torch.uint8)
            arena.reach(HANDLE_BYTES, 6 * HANDLE_BYTES)
            arena.write(HANDLE_BYTES, expected)
            assert sum(driver.mapped.values()) == 7
            assert torch.equal(arena.bytes_B[HANDLE_BYTES : 6 * HANDLE_BYTES], expected)
            arena.unmap()
            assert not driver.mapped
            assert pool.free_bytes == 7 * HANDLE_BYTES


@pytest.mark.parametrize(
    ("budget_gb", "handle_mib"), [(0.1, 32), (12, 32), (20, 64), (40, 128), (70, 128), (113, 128), (1000, 128)]
)
def test_handles_are_small_beside_the_models_of_a_budget(budget_gb: float, handle_mib: int):
    assert choose_handle_bytes(int(budget_gb * 10**9)) == handle_mib * 1024**2


@pytest.fixture
def make_cuda_pool() -> Callable[[int], DevicePool]:
    """A pool of so many handles on the first CUDA device."""
    from flashtensors.memory.cuda_driver import CudaMemoryDriver

    driver: MemoryDriver = CudaMemoryDriver("cuda")

    def make(num_handles: int) -> DevicePool:
        num_bytes = 64 * 1024**2
        return DevicePool(driver, num_handles * num_bytes, handle_bytes=num_bytes)

    return make


@pytest.mark.gpu
def test_a_captured_graph_computes_with_the_weights_of_the_day(make_cuda_pool: Callable[[int], DevicePool]):
    generator = torch.Generator("cuda").manual_seed(0)
    models = [torch.randn(512, 512, device="cuda", generator=generator) for _ in range(3)]
    x = torch.randn(4, 512, device="cuda", generator=generator)
    y = torch.empty_like(x)
    with make_cuda_pool(3) as pool, WeightArena(pool, 100 * 1024**2) as arena, WeightArena(pool, 10) as other:
        arena.map()
        weights = arena.view(256, (512, 512), torch.float32)
        weights.copy_(models[0])
        torch.mm(x, weights, out=y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.mm(x, weights, out=y)
        arena.captured["forward"] = graph
        for model in models:
            torch.cuda.synchronize()
            arena.unmap()
            other.map()  # so that other handles come back to the arena
            arena.map()
            other.unmap()
            weights.copy_(model)
            y.zero_()
            graph.replay()
            assert torch.equal(y, x @ model)
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_device_memory_is_shared_between_arenas(make_cuda_pool: Callable[[int], DevicePool]):
    with make_cuda_pool(2) as pool, WeightArena(pool, 100 * 1024**2) as left, WeightArena(pool, 100) as right:
        left.map()
        left.bytes_B.fill_(5)
        assert left.bytes_B.device == pool.driver.device
        with pytest.raises(CapacityError):
            right.map()
        torch.cuda.synchronize()
        left.unmap()
        right.map()
        right.write(0, torch.arange(10, dtype=torch.uint8))
        assert right.view(0, (10,), torch.uint8).tolist() == list(range(10))
        torch.cuda.synchronize()
