"""Whole loads from files that disks, writers and other processes have been at, by every way that bytes can take.

The oracle is what was written: each tensor's bytes, by name. The fault of a read depends on where it reads alone, never
on the order in which threads come.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flashtensors.checkpoint.chunk_digests import DIGEST_CHUNK_BYTES, DigestCheck
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.errors import CheckpointError, DigestMismatch, FlashError, TransferError, TruncatedFile
from flashtensors.memory.arena import Arena
from flashtensors.memory.host_pool import PAGE_SLACK_BYTES, HostPool
from flashtensors.transfer.host_image import HostImage
from flashtensors.transfer.load_plan import LoadPlan, make_copy_plan
from flashtensors.transfer.pipeline import fill_image, load
from flashtensors.transfer.probe import FileSystemProbe
from flashtensors.transfer.readers.automatic import AutomaticReader
from flashtensors.transfer.readers.buffered import BufferedReader
from flashtensors.transfer.readers.direct import DirectReader
from flashtensors.transfer.readers.files import Preadv

CHUNK_BYTES = 4096
GIB = 1024**3
SECTOR_BYTES = 512
READERS = [BufferedReader, DirectReader]
NUM_PAGES = {"in place": 0, "ring": 3, "host tier": 64, "full host tier": 5}
"""Pages of the pool, by the way that bytes take; the full host tier keeps what fits, and the ring takes the rest."""
Tensors = dict[str, bytes]


def make_tensors(seed: int = 0) -> Tensors:
    """Odd lengths, some of none, in two dozen chunks."""
    rng = random.Random(seed)
    sizes = [0, 1, 4095, 4096, 4097, 0, 12_289, 3, 20_001, 8192, 33_333, 511, 0]
    return {f"{index:02d}": rng.randbytes(size) for index, size in enumerate(sizes)}


def write_file(path: Path, tensors: Tensors, *, lead: int = 0) -> None:
    """Write a file whose first tensor begins `lead` bytes behind a multiple of 4096."""
    header: dict[str, Any] = {}
    end = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * ((lead - 8 - len(text)) % 4096)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))


def make_plan(folder: Path, names: list[str] | None = None) -> LoadPlan:
    entries = open_checkpoint(folder).tensors
    return make_copy_plan(entries[name] for name in names or entries)


@pytest.fixture
def tensors() -> Tensors:
    return make_tensors()


@pytest.fixture(params=[0, 1, 2049])
def plan(tmp_path: Path, tensors: Tensors, request: pytest.FixtureRequest) -> LoadPlan:
    """Two files of which neither tensors nor ends are aligned."""
    names = list(tensors)
    for index in range(2):
        of_file = {name: tensors[name] for name in names[index::2]}
        write_file(tmp_path / f"part-{index}.safetensors", of_file, lead=request.param)
    return make_plan(tmp_path)


@contextlib.contextmanager
def open_way(way: str, plan: LoadPlan, chunk_bytes: int = CHUNK_BYTES) -> Iterator[dict[str, Any]]:
    """Options of `load` for one way; all pages must have come back at the end."""
    if way == "in place":
        yield {"chunk_size": chunk_bytes}
        return
    with HostPool(NUM_PAGES[way] * (chunk_bytes + PAGE_SLACK_BYTES), chunk_bytes=chunk_bytes, num_threads=1) as pool:
        if way == "ring":
            yield {"pool": pool}
        else:
            with HostImage(plan, pool) as image:
                yield {"image": image}
        assert pool.free_bytes == pool.num_bytes, "a page was lost"


def load_bytes(plan: LoadPlan, **options: Any) -> Tensors:
    with Arena.allocate(plan.num_bytes) as arena:
        load(plan, arena, **options)
        return {name: tensor.numpy().tobytes() for name, tensor in plan.tensors(arena).items()}


class Disk:
    """A `preadv` that cuts reads anywhere, and cannot read some sectors."""

    def __init__(self, seed: int, bad_sectors: dict[Path, int] | None = None) -> None:
        self._seed = seed
        self._bad_sectors = {str(path): sector for path, sector in (bad_sectors or {}).items()}

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        num_bytes = random.Random(f"{self._seed} {offset} {len(buffer)}").choice(
            [len(buffer), len(buffer) // 3, SECTOR_BYTES, 1]
        )
        bad = self._bad_sectors.get(os.readlink(f"/proc/self/fd/{fd}"))
        if bad is not None and offset < bad + SECTOR_BYTES:
            if offset >= bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            num_bytes = min(num_bytes, bad - offset)
        return os.preadv(fd, [buffer[: max(num_bytes, 1)]], offset)


def through(preadv: Preadv, reader: type[BufferedReader | DirectReader] = BufferedReader) -> Callable[..., Any]:
    return partial(reader, preadv=preadv)


# Reads.


@pytest.mark.parametrize("make_reader", READERS)
@pytest.mark.parametrize("way", NUM_PAGES)
def test_reads_may_end_anywhere(plan: LoadPlan, tensors: Tensors, way: str, make_reader: type[BufferedReader]):
    for seed in range(3):
        with open_way(way, plan) as options:
            reader = through(Disk(seed).preadv, make_reader)
            assert load_bytes(plan, num_threads=3, open_reader=reader, **options) == tensors


@pytest.mark.parametrize("make_reader", READERS)
@pytest.mark.parametrize("way", NUM_PAGES)
def test_a_bad_sector_is_named_or_not_needed(
    plan: LoadPlan, tensors: Tensors, way: str, make_reader: type[BufferedReader]
):
    rng = random.Random(way)
    for seed in range(8):
        path = rng.choice(list(plan.files))
        sector = rng.randrange(path.stat().st_size // SECTOR_BYTES) * SECTOR_BYTES
        reader = through(Disk(seed, {path: sector}).preadv, make_reader)
        is_needed = any(
            extent.path == path
            and extent.file_offset < sector + SECTOR_BYTES
            and sector < extent.file_offset + extent.num_bytes
            for extent in plan.extents
        )
        with open_way(way, plan) as options:
            if is_needed:
                with pytest.raises(TransferError, match=rf"{path}: .* failed: Input/output error") as failed:
                    load_bytes(plan, num_threads=2, open_reader=reader, **options)
                found = re.search(r"reading \d+ bytes at byte (\d+) ", failed.value.message)
                assert found is not None
                assert sector <= int(found[1]) < sector + SECTOR_BYTES
            assert load_bytes(plan, num_threads=2, **options) == tensors, "the sector was mended"


# Files that others write.


@pytest.mark.parametrize("way", NUM_PAGES)
def test_a_load_under_way_reads_the_file_that_it_opened(plan: LoadPlan, tensors: Tensors, way: str):
    once = threading.Lock()

    def replace_first(fd: int, buffers: list[memoryview], offset: int) -> int:
        if once.acquire(blocking=False):
            for path in plan.files:
                other = path.with_suffix(".new")
                other.write_bytes(bytes(path.stat().st_size))
                other.replace(path)
        return os.preadv(fd, buffers, offset)

    with open_way(way, plan) as options:
        assert load_bytes(plan, num_threads=2, open_reader=through(replace_first), **options) == tensors


@pytest.mark.parametrize("way", NUM_PAGES)
def test_a_file_that_is_cut_under_way(plan: LoadPlan, way: str):
    victim = max(plan.files, key=lambda path: plan.files[path].num_bytes)
    num_bytes = victim.stat().st_size

    def cut_first(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(victim, num_bytes - 1000)
        return os.preadv(fd, buffers, offset)

    with open_way(way, plan) as options, pytest.raises(TruncatedFile, match=f"{victim}: the file ends at byte"):
        load_bytes(plan, num_threads=2, open_reader=through(cut_first), **options)


@pytest.mark.parametrize("way", NUM_PAGES)
@pytest.mark.parametrize("make_reader", [*READERS, AutomaticReader])
def test_a_file_that_was_replaced_under_a_plan_is_not_mixed_in(
    plan: LoadPlan, way: str, make_reader: type[BufferedReader]
):
    with open_way(way, plan) as options:
        if "image" in options:
            fill_image(options["image"])
            options["image"].drop_tail(CHUNK_BYTES)
        last = plan.extents[-1].path
        other = last.with_suffix(".new")
        other.write_bytes(last.read_bytes())
        os.utime(other, ns=(0, plan.files[last].modified_ns + 1))
        other.replace(last)
        with pytest.raises(CheckpointError, match=f"{last}: the file was replaced"):
            load_bytes(plan, open_reader=make_reader, **options)


def test_a_tail_with_other_bytes_is_not_joined_to_a_head_in_the_host_tier(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    tensors = {name: random.Random(name).randbytes(DIGEST_CHUNK_BYTES) for name in "ab"}
    write_file(path, tensors)
    plan = make_plan(tmp_path)
    sizes = {path: path.stat().st_size}
    with open_way("host tier", plan, DIGEST_CHUNK_BYTES) as options:
        first = DigestCheck(sizes)
        assert load_bytes(plan, check=first, **options) == tensors
        options["image"].drop_tail(1)
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([tensors["b"][-1] ^ 1]))
        os.utime(path, ns=(0, plan.files[path].modified_ns))
        with pytest.raises(DigestMismatch, match=str(path)):
            load_bytes(plan, check=DigestCheck(sizes, first.digests()), **options)


# Places beyond 32 bits.


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A folder with one sparse file, and what lies around 2 GiB, around 4 GiB and at its end."""
    folder = tmp_path_factory.mktemp("sparse")
    rng = random.Random(0)
    edges = {"two": 2 * GIB - 5001, "four": 4 * GIB - 3, "end": 5 * GIB + 77}
    tensors = {name: rng.randbytes(10_001) for name in edges}
    header: dict[str, Any] = {}
    end = 0
    for name, start in edges.items():
        header[f"before {name}"] = {"dtype": "U8", "shape": [start - end], "data_offsets": [end, start]}
        end = start + len(tensors[name])
        header[name] = {"dtype": "U8", "shape": [len(tensors[name])], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, start in edges.items():
            file.seek(8 + len(text) + start)
            file.write(tensors[name])
    return folder, tensors


@pytest.mark.parametrize("make_reader", READERS)
@pytest.mark.parametrize("way", NUM_PAGES)
def test_offsets_beyond_32_bits(sparse: tuple[Path, Tensors], way: str, make_reader: type[BufferedReader]):
    folder, tensors = sparse
    near = make_plan(folder, list(tensors))
    plan = replace(  # the arena's memory is taken only where it is written
        near,
        extents=tuple(replace(extent, arena_offset=extent.arena_offset + 5 * GIB) for extent in near.extents),
        planned_tensors=tuple(
            replace(tensor, arena_offset=tensor.arena_offset + 5 * GIB) for tensor in near.planned_tensors
        ),
        num_bytes=near.num_bytes + 5 * GIB,
    )
    with open_way(way, plan) as options:
        assert load_bytes(plan, num_threads=2, open_reader=make_reader, **options) == tensors


# File systems.


def test_a_file_system_without_direct_reads(tensors: Tensors):
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no tmpfs here")
    path = memory / f"flashtensors-test-{os.getpid()}" / "model.safetensors"
    path.parent.mkdir()
    try:
        write_file(path, tensors, lead=13)
        plan = make_plan(path.parent)
        for way in NUM_PAGES:
            with open_way(way, plan) as options, Arena.allocate(plan.num_bytes) as arena:
                opener = partial(AutomaticReader, probe=FileSystemProbe())
                assert load(plan, arena, open_reader=opener, **options).reader == "buffered"
                loaded = {name: tensor.numpy().tobytes() for name, tensor in plan.tensors(arena).items()}
                assert loaded == tensors
    finally:
        path.unlink(missing_ok=True)
        path.parent.rmdir()


@pytest.mark.parametrize("way", NUM_PAGES)
def test_no_fault_leaves_a_descriptor_or_a_thread(plan: LoadPlan, way: str):
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with open_way(way, plan) as options:
        load_bytes(plan, **options)
        before = count()
        for make_reader in READERS:
            for seed in range(3):
                broken = Disk(seed, dict.fromkeys(plan.files, 4096)).preadv
                if "image" in options:
                    options["image"].drop_tail(options["image"].num_bytes)
                with pytest.raises(FlashError):
                    load_bytes(plan, num_threads=4, open_reader=through(broken, make_reader), **options)
        assert count() == before
