"""Loads by way of pages, on a CPU: rings, the host tier, restarts, layers that land early, faults at every stage."""

from __future__ import annotations

import errno
import gc
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.chunk_digests import DigestCheck
from flashtensors.checkpoint.layout import Weight, WeightLayout
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.errors import CapacityError, DigestMismatch, TransferError, TruncatedFile, UnsupportedModel
from flashtensors.memory.arena import Arena
from flashtensors.memory.host_mapping import HostMapping, create_memory_file
from flashtensors.memory.host_pool import PAGE_SLACK_BYTES, HostPool, Page
from flashtensors.transfer import paged_load
from flashtensors.transfer.copy_stream import HostCopyStream
from flashtensors.transfer.host_image import HostImage
from flashtensors.transfer.layer_events import LayerEvents
from flashtensors.transfer.load_plan import LoadPlan, make_load_plan
from flashtensors.transfer.pipeline import fill_image, load
from flashtensors.transfer.readers.buffered import BufferedReader
from flashtensors.transfer.readers.files import Preadv

MakeCheckpoint = Callable[..., Path]
CHUNK_BYTES = 4096
PAGE_BYTES = CHUNK_BYTES + PAGE_SLACK_BYTES
NUM_LAYERS = 4


def make_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed": (301, 7), "norm": (7,)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"layers.{layer}.{name}": (200 + 3 * layer, 7) for name in "qkv"}
        shapes |= {f"layers.{layer}.norm": (7,), f"layers.{layer}.empty": (0, 7)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_layout() -> WeightLayout:
    tensors = make_tensors(torch.bfloat16)

    def weight(name: str, sources: tuple[str, ...], layer: int | None) -> Weight:
        shapes = tuple(tuple(tensors[source].shape) for source in sources)
        rows = sum(shape[0] for shape in shapes)
        return Weight(name=name, shape=(rows, *shapes[0][1:]), sources=sources, source_shapes=shapes, layer=layer)

    weights = [weight("embed", ("embed",), None)]
    for layer in range(NUM_LAYERS):
        prefix = f"layers.{layer}"
        weights += [weight(f"{prefix}.{name}", (f"{prefix}.{name}",), layer) for name in ("norm", "empty")]
        weights.append(weight(f"{prefix}.qkv", tuple(f"{prefix}.{name}" for name in "qkv"), layer))
    return WeightLayout(weights=(*weights, weight("norm", ("norm",), None)))


def expected_weights(dtype: torch.dtype, stored: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in make_tensors(stored).items()}
    return {weight.name: torch.cat([tensors[source] for source in weight.sources]) for weight in make_layout().weights}


@pytest.fixture
def plan(make_checkpoint: MakeCheckpoint) -> LoadPlan:
    """A bf16 checkpoint in two files that is loaded as it is."""
    tensors = make_tensors(torch.bfloat16)
    names = list(tensors)
    folder = make_checkpoint(
        {name: tensors[name] for name in names[::2]}, {name: tensors[name] for name in names[1::2]}
    )
    return make_load_plan(make_layout(), open_checkpoint(folder), "bfloat16")


def make_pool(num_pages: int, fd: int | None = None) -> HostPool:
    return HostPool(num_pages * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, num_threads=2, fd=fd)


@pytest.fixture
def pool() -> Iterator[HostPool]:
    """Room for all of the plan's chunks."""
    with make_pool(64) as pool:
        yield pool


@pytest.fixture
def arena(plan: LoadPlan) -> Iterator[Arena]:
    with Arena.allocate(plan.num_bytes) as arena:
        yield arena


def assert_loaded(plan: LoadPlan, arena: Arena, expected: dict[str, torch.Tensor] | None = None) -> None:
    loaded = plan.tensors(arena)
    for name, tensor in (expected or expected_weights(torch.bfloat16)).items():
        assert torch.equal(loaded[name], tensor), name


def no_reader(files: object) -> BufferedReader:
    raise AssertionError("the disk was asked")


def with_preadv(preadv: Preadv) -> Callable[..., BufferedReader]:
    return partial(BufferedReader, preadv=preadv)


@pytest.mark.parametrize("num_threads", [1, 3, 16])
@pytest.mark.parametrize("num_pages", [1, 2, 5, 64])
def test_a_ring_of_any_length_carries_a_load(plan: LoadPlan, arena: Arena, num_threads: int, num_pages: int):
    with make_pool(num_pages) as pool:
        stats = load(plan, arena, pool=pool, num_threads=num_threads)
        assert_loaded(plan, arena)
        assert pool.free_bytes == pool.num_bytes
    assert stats.reader == "buffered"
    assert stats.host_tier_bytes == 0


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_elements_are_converted_on_the_way(
    make_checkpoint: MakeCheckpoint, pool: HostPool, stored: torch.dtype, wanted: str
):
    checkpoint = open_checkpoint(make_checkpoint(make_tensors(stored)))
    plan = make_load_plan(make_layout(), checkpoint, wanted)
    with Arena.allocate(plan.num_bytes) as arena:
        load(plan, arena, pool=pool)
        assert_loaded(plan, arena, expected_weights(getattr(torch, wanted), stored))


def test_values_beyond_float16_are_refused(make_checkpoint: MakeCheckpoint, pool: HostPool):
    tensors = make_tensors(torch.bfloat16)
    tensors["layers.2.k"][50, 3] = 1e5
    plan = make_load_plan(make_layout(), open_checkpoint(make_checkpoint(tensors)), "float16")
    with pytest.raises(UnsupportedModel, match=r"'layers.2.k' has values beyond float16"):
        load(plan, Arena.allocate(plan.num_bytes), pool=pool)
    assert pool.free_bytes == pool.num_bytes


# The host tier.


def test_a_model_in_the_host_tier_needs_no_disk(plan: LoadPlan, arena: Arena, pool: HostPool):
    with HostImage(plan, pool) as image:
        load(plan, arena, image=image, num_threads=3)
        assert_loaded(plan, arena)
        assert image.is_complete
        assert image.num_bytes == image.full_num_bytes == pool.num_bytes - pool.free_bytes
        for path in plan.files:
            path.unlink()
        arena.bytes_B.zero_()
        stats = load(plan, arena, image=image, open_reader=no_reader)
        assert_loaded(plan, arena)
    assert (stats.reader, stats.host_tier_bytes) == ("none", plan.file_bytes)
    assert pool.free_bytes == pool.num_bytes


def test_a_prefetched_model_needs_no_disk(plan: LoadPlan, arena: Arena, pool: HostPool):
    seen: list[tuple[int, int]] = []
    with HostImage(plan, pool) as image:
        fill_image(image, progress=lambda *now: seen.append(now))
        assert image.is_complete
        assert seen[-1] == (plan.file_bytes, plan.file_bytes)
        load(plan, arena, image=image, open_reader=no_reader)
        assert_loaded(plan, arena)


@pytest.mark.parametrize("dropped_pages", [1, 3, 100])
def test_the_last_layers_are_dropped_first_and_read_again(
    plan: LoadPlan, arena: Arena, pool: HostPool, dropped_pages: int
):
    with HostImage(plan, pool) as image:
        fill_image(image)
        num_blocks = len(image.block_list.blocks)
        freed_bytes = image.drop_tail(dropped_pages * PAGE_BYTES)
        num_left = max(0, num_blocks - dropped_pages)
        assert freed_bytes == (num_blocks - num_left) * PAGE_BYTES
        assert sorted(image.page_indexes) == list(range(num_left))
        stats = load(plan, arena, image=image)
        assert_loaded(plan, arena)
        assert image.is_complete
        of_kept = image.block_list.blocks[:num_left]
        assert stats.host_tier_bytes == sum(block.used_bytes for block in of_kept)


def test_a_pool_that_is_too_small_keeps_what_fits(plan: LoadPlan, arena: Arena):
    with make_pool(6) as pool, HostImage(plan, pool) as image:
        fill_image(image)
        assert sorted(image.page_indexes) == list(range(6)), "the first layers"
        load(plan, arena, image=image)
        assert_loaded(plan, arena)
        assert len(image.page_indexes) == 6
        image.drop_tail(3 * PAGE_BYTES)
        load(plan, arena, image=image)
        assert_loaded(plan, arena)


def test_a_slow_thread_holds_no_page_that_another_reads_the_last_block_without(
    plan: LoadPlan, arena: Arena, pool: HostPool, monkeypatch: pytest.MonkeyPatch
):
    with HostImage(plan, pool) as image:
        fill_image(image)
        last = image.block_list.blocks[-1]
        image.drop_tail(2 * PAGE_BYTES)
        is_last_read, take_page, waits = threading.Event(), image.take_page, [True]

        def take_page_slowly() -> Page | None:
            page = take_page()
            if waits and waits.pop():
                is_last_read.wait(0.3)  # one who lets nobody past waits in vain
            return page

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            num_bytes = os.preadv(fd, buffers, offset)
            if os.readlink(f"/proc/self/fd/{fd}") == str(last.path) and offset >= last.file_offset:
                is_last_read.set()
            return num_bytes

        monkeypatch.setattr(image, "take_page", take_page_slowly)
        load(plan, arena, image=image, num_threads=2, open_reader=with_preadv(preadv))
        assert is_last_read.is_set()
        assert_loaded(plan, arena)
        assert image.is_complete


def test_two_models_share_a_pool_that_holds_one(plan: LoadPlan, arena: Arena):
    with make_pool(9) as pool, HostImage(plan, pool) as left, HostImage(plan, pool) as right:
        for image in (left, right, left):
            load(plan, arena, image=image, num_threads=2)
            assert_loaded(plan, arena)
        assert left.num_bytes + right.num_bytes <= pool.num_bytes


def test_a_restarted_process_is_hot_again(plan: LoadPlan, arena: Arena):
    fd = create_memory_file(64 * PAGE_BYTES)
    try:
        with make_pool(64, fd) as pool:
            image = HostImage(plan, pool)
            fill_image(image)
            page_indexes = image.page_indexes
        with make_pool(64, fd) as pool, HostImage.restore(plan, pool, page_indexes) as image:
            load(plan, arena, image=image, open_reader=no_reader)
            assert_loaded(plan, arena)
            with pytest.raises(CapacityError, match="is not free"):
                HostImage.restore(plan, pool, page_indexes)
    finally:
        os.close(fd)


# Faults.


def fail_after(num_reads: int, code: int) -> Preadv:
    left = [num_reads]

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return os.preadv(fd, buffers, offset)

    return preadv


@pytest.mark.parametrize("num_reads", [0, 1, 5, 9])
@pytest.mark.parametrize("is_kept", [False, True])
def test_a_failed_load_gives_every_page_back_but_those_it_can_use_again(
    plan: LoadPlan, arena: Arena, pool: HostPool, num_reads: int, is_kept: bool
):
    image = HostImage(plan, pool) if is_kept else None
    with pytest.raises(TransferError, match=r"part-\d.safetensors: reading .* at byte \d+ failed: Input/output error"):
        load(
            plan,
            arena,
            pool=pool,
            image=image,
            num_threads=3,
            open_reader=with_preadv(fail_after(num_reads, errno.EIO)),
        )
    kept_bytes = image.num_bytes if image is not None else 0
    assert pool.free_bytes == pool.num_bytes - kept_bytes
    assert kept_bytes <= num_reads * PAGE_BYTES
    load(plan, arena, pool=pool, image=image)
    assert_loaded(plan, arena)


def test_a_file_that_shrinks(plan: LoadPlan, arena: Arena, pool: HostPool):
    with pytest.raises(TruncatedFile, match=r"the file ends at byte \d+"):
        load(plan, arena, pool=pool, open_reader=with_preadv(lambda fd, buffers, offset: 0))


def test_cancelling_gives_every_page_back(plan: LoadPlan, arena: Arena, pool: HostPool):
    cancel = threading.Event()

    def cancel_then_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        cancel.set()
        return os.preadv(fd, buffers, offset)

    with pytest.raises(TransferError, match="cancelled"):
        load(plan, arena, pool=pool, cancel=cancel, num_threads=2, open_reader=with_preadv(cancel_then_read))
    assert pool.free_bytes == pool.num_bytes


def test_no_thread_outlives_a_load(plan: LoadPlan, arena: Arena, pool: HostPool):
    pool.wait()
    before = threading.active_count()
    load(plan, arena, pool=pool, num_threads=8)
    with pytest.raises(TransferError):
        load(plan, arena, pool=pool, num_threads=8, open_reader=with_preadv(fail_after(2, errno.EIO)))
    assert threading.active_count() == before


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_load_holds_nothing_when_it_has_returned(plan: LoadPlan, is_paged: bool):
    arena_fd, pool_fd = create_memory_file(plan.num_bytes, "the-arena"), create_memory_file(64 * PAGE_BYTES, "the-pool")
    gc.disable()
    try:
        mapping = HostMapping(plan.num_bytes, arena_fd)
        with Arena(mapping.bytes_B) as arena, make_pool(64, pool_fd) as pool:
            mapping.close()
            load(plan, arena, pool=pool if is_paged else None)
            assert "the-arena" in mapped_files()
        assert "the-arena" not in mapped_files()
        assert "the-pool" not in mapped_files()
    finally:
        gc.enable()
        os.close(arena_fd)
        os.close(pool_fd)


# Layers.


def test_a_layer_can_be_computed_with_while_the_last_one_is_still_read(plan: LoadPlan, arena: Arena, pool: HostPool):
    events, may_end = LayerEvents(), threading.Event()
    last = HostImage(plan, pool).block_list.blocks[-1]

    def hold_back_the_last(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(last.path) and offset >= last.file_offset:
            assert may_end.wait(30)
        return os.preadv(fd, buffers, offset)

    options = {"pool": pool, "events": events, "open_reader": with_preadv(hold_back_the_last)}
    thread = threading.Thread(target=load, args=(plan, arena), kwargs=options)
    thread.start()
    for layer in range(NUM_LAYERS - 1):
        assert events.wait(layer, timeout_s=30)
        expected = expected_weights(torch.bfloat16)[f"layers.{layer}.qkv"]
        assert torch.equal(plan.tensors(arena)[f"layers.{layer}.qkv"], expected)
    assert torch.equal(plan.tensors(arena)["embed"], expected_weights(torch.bfloat16)["embed"])
    assert not events.wait(None, timeout_s=0.01)
    may_end.set()
    assert events.wait(None, timeout_s=30)
    assert_loaded(plan, arena)
    thread.join()


@pytest.mark.parametrize("is_early", [False, True])
def test_who_computes_hears_that_the_rest_will_soon_be_read(
    is_early: bool, plan: LoadPlan, arena: Arena, pool: HostPool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(paged_load, "EARLY_S", 1e9 if is_early else 0.0)
    monkeypatch.setattr(HostCopyStream, "has_events", True)
    last, may_end, has_read = HostImage(plan, pool).block_list.blocks[-1], threading.Event(), threading.Event()
    calls: list[bool] = []

    def hold_back_the_last(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(last.path) and offset >= last.file_offset:
            assert may_end.wait(30)
            has_read.set()
        return os.preadv(fd, buffers, offset)

    def note() -> None:
        calls.append(has_read.is_set())
        may_end.set()

    if not is_early:
        may_end.set()
    load(plan, arena, pool=pool, open_reader=with_preadv(hold_back_the_last), on_near=note)
    assert calls == [not is_early]
    assert_loaded(plan, arena)


def test_who_waits_for_a_layer_hears_that_the_load_failed(plan: LoadPlan, arena: Arena, pool: HostPool):
    events = LayerEvents()
    with pytest.raises(TransferError):
        load(plan, arena, pool=pool, events=events, open_reader=with_preadv(fail_after(0, errno.EIO)))
    with pytest.raises(TransferError, match=r"layer 3 was not loaded: .*Input/output error"):
        events.wait(3)


def test_layers_of_a_load_in_place_have_landed_when_it_ends(plan: LoadPlan, arena: Arena):
    events = LayerEvents()
    load(plan, arena, events=events)
    assert events.wait(2, timeout_s=1)
    assert events.wait(None, timeout_s=1)


# Digests.


@pytest.fixture
def large_plan(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> LoadPlan:
    """The same plan under digests of small chunks."""
    monkeypatch.setattr("flashtensors.checkpoint.chunk_digests.DIGEST_CHUNK_BYTES", CHUNK_BYTES)
    monkeypatch.setattr("flashtensors.transfer.pipeline.DIGEST_CHUNK_BYTES", CHUNK_BYTES)
    folder = make_checkpoint(make_tensors(torch.bfloat16))
    return make_load_plan(make_layout(), open_checkpoint(folder), "bfloat16")


@pytest.mark.parametrize("is_paged", [False, True])
def test_a_flipped_bit_is_found_wherever_it_is(large_plan: LoadPlan, pool: HostPool, is_paged: bool):
    (path,) = large_plan.files
    sizes = {path: path.stat().st_size}
    options = {"pool": pool} if is_paged else {"chunk_size": CHUNK_BYTES}
    with Arena.allocate(large_plan.num_bytes) as arena:
        first = DigestCheck(sizes)
        load(large_plan, arena, check=first, **options)
        known = first.digests()
        assert first.num_recorded == -(-sizes[path] // CHUNK_BYTES)
        again = DigestCheck(sizes, known)
        assert load(large_plan, arena, check=again, **options).num_checked == first.num_recorded
        assert_loaded(large_plan, arena)
        original = path.read_bytes()
        state = path.stat()
        for offset in range(0, sizes[path], 1777):
            damaged = bytearray(original)
            damaged[offset] ^= 1 << offset % 8
            path.write_bytes(damaged)
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
            with pytest.raises(DigestMismatch, match=rf"{path}: chunk {offset // CHUNK_BYTES} .*pull the model again"):
                load(large_plan, arena, check=DigestCheck(sizes, known), **options)
    assert pool.free_bytes == pool.num_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("num_pages", [3, 64])
def test_device_loads_through_a_pool(plan: LoadPlan, num_pages: int):
    from flashtensors.memory.pinning import find_pinning

    pinning = find_pinning("cuda")
    with (
        HostPool(num_pages * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, pinning=pinning) as pool,
        HostImage(plan, pool) as image,
        Arena.allocate(plan.num_bytes, "cuda") as arena,
    ):
        for _ in range(3):
            arena.bytes_B.zero_()
            events, stream = LayerEvents(), torch.cuda.Stream()
            load(plan, arena, image=image, events=events, num_threads=4)
            assert events.wait(1, stream)
            with torch.cuda.stream(stream):
                copied = plan.tensors(arena)["layers.1.qkv"].clone()
            stream.synchronize()
            assert torch.equal(copied.cpu(), expected_weights(torch.bfloat16)["layers.1.qkv"])
            loaded = {name: tensor.cpu() for name, tensor in plan.tensors(arena).items()}
            for name, tensor in expected_weights(torch.bfloat16).items():
                assert torch.equal(loaded[name], tensor), name
            image.drop_tail(2 * PAGE_BYTES)
