"""Loads against the bytes on disk, through ordinary, tiny and faulty readers."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.layout import WeightLayout
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.errors import CheckpointError, FileChanged, TransferError, TruncatedFile, UnsupportedModel
from flashtensors.memory.arena import Arena
from flashtensors.transfer.load_plan import LoadPlan, make_copy_plan, make_load_plan
from flashtensors.transfer.pipeline import OpenReader, load
from flashtensors.transfer.readers.buffered import BufferedReader

MakeCheckpoint = Callable[..., Path]
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"q": (301, 17), "k": (100, 17), "v": (99, 17), "n": (17,)}


@pytest.fixture
def layout(make_layout: Callable[..., WeightLayout]) -> WeightLayout:
    """A fused weight and a norm of `SHAPES`."""
    return make_layout(qkv={name: SHAPES[name] for name in "qkv"}, norm={"n": SHAPES["n"]})


def layout_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def plan(layout: WeightLayout, make_checkpoint: MakeCheckpoint) -> LoadPlan:
    """A bf16 checkpoint in two files, loaded as it is."""
    tensors = layout_tensors(torch.bfloat16)
    folder = make_checkpoint({name: tensors[name] for name in "qk"}, {name: tensors[name] for name in "vn"})
    return make_load_plan(layout, open_checkpoint(folder), "bfloat16")


def expected_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"qkv": torch.cat([tensors["q"], tensors["k"], tensors["v"]]), "norm": tensors["n"]}


def assert_loads(plan: LoadPlan, expected: dict[str, torch.Tensor], **options: object) -> None:
    with Arena.allocate(plan.num_bytes) as arena:
        stats = load(plan, arena, **options)
        loaded = plan.tensors(arena)
    assert stats.num_bytes == plan.file_bytes
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("chunk_size", [4096, 2**20])
def test_weights_are_the_bytes_on_disk(plan: LoadPlan, num_threads: int, chunk_size: int):
    expected = expected_weights(layout_tensors(torch.bfloat16))
    assert_loads(plan, expected, num_threads=num_threads, chunk_size=chunk_size)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_conversion_is_torchs(layout: WeightLayout, make_checkpoint: MakeCheckpoint, source: str, target: str):
    tensors = layout_tensors(FLOATS[source])
    plan = make_load_plan(layout, open_checkpoint(make_checkpoint(tensors)), target)
    expected = {name: tensor.to(FLOATS[target]) for name, tensor in expected_weights(tensors).items()}
    assert_loads(plan, expected, chunk_size=4096)


def test_values_beyond_float16_are_refused_not_made_infinite(layout: WeightLayout, make_checkpoint: MakeCheckpoint):
    tensors = layout_tensors(torch.bfloat16)
    tensors["k"][7, 3] = 1e5
    plan = make_load_plan(layout, open_checkpoint(make_checkpoint(tensors)), "float16")
    with pytest.raises(UnsupportedModel, match="tensor 'k' has values beyond float16"):
        load(plan, Arena.allocate(plan.num_bytes))


def test_infinities_that_the_checkpoint_has_stay(layout: WeightLayout, make_checkpoint: MakeCheckpoint):
    tensors = layout_tensors(torch.bfloat16)
    tensors["n"][0] = -torch.inf
    plan = make_load_plan(layout, open_checkpoint(make_checkpoint(tensors)), "float16")
    assert_loads(plan, {name: tensor.half() for name, tensor in expected_weights(tensors).items()})


def test_empty_and_zero_dim_tensors(make_checkpoint: MakeCheckpoint):
    tensors = {"empty": torch.zeros(0, 3), "zero_dim": torch.tensor(7), "flags": torch.tensor([True, False])}
    plan = make_copy_plan(open_checkpoint(make_checkpoint(tensors)).tensors.values())
    assert_loads(plan, tensors)


def test_a_plan_without_bytes(make_checkpoint: MakeCheckpoint):
    plan = make_copy_plan(open_checkpoint(make_checkpoint({"empty": torch.zeros(0)})).tensors.values())
    assert_loads(plan, {"empty": torch.zeros(0)})


def test_progress_ends_at_the_total(plan: LoadPlan):
    seen: list[tuple[int, int]] = []
    load(plan, Arena.allocate(plan.num_bytes), chunk_size=4096, progress=lambda *now: seen.append(now))
    assert seen[-1] == (plan.file_bytes, plan.file_bytes)
    assert seen == sorted(seen)


def test_stats_name_phases_and_reader(plan: LoadPlan):
    stats = load(plan, Arena.allocate(plan.num_bytes))
    assert stats.phase_seconds.keys() == {"prepare", "read"}
    assert stats.reader == "buffered"
    assert stats.gigabytes_per_second > 0


def faulty(preadv: Callable[[int, list[memoryview], int], int]) -> OpenReader:
    return partial(BufferedReader, preadv=preadv)


def test_short_reads_are_continued(plan: LoadPlan):
    def read_a_little(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, [buffers[0][:100]], offset)

    expected = expected_weights(layout_tensors(torch.bfloat16))
    assert_loads(plan, expected, open_reader=faulty(read_a_little))


def test_an_io_error_names_file_and_offset(plan: LoadPlan):
    bad = plan.extents[2]

    def fail_in_the_second_file(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(bad.path) and offset >= bad.file_offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset)

    with pytest.raises(TransferError, match=rf"{bad.path}: .*at byte {bad.file_offset} failed: Input/output error"):
        load(plan, Arena.allocate(plan.num_bytes), num_threads=1, open_reader=faulty(fail_in_the_second_file))


def test_the_first_error_stops_the_other_thread(plan: LoadPlan):
    offsets: list[int] = []

    def fail_first_then_dawdle(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        if len(offsets) == 1:
            raise OSError(errno.EIO, "broken")
        time.sleep(0.1)
        return os.preadv(fd, buffers, offset)

    with pytest.raises(TransferError, match="broken"):
        load(
            plan,
            Arena.allocate(plan.num_bytes),
            num_threads=2,
            chunk_size=4096,
            open_reader=faulty(fail_first_then_dawdle),
        )
    assert len(offsets) <= 3, "of 6 pieces"


def test_a_file_that_shrinks_while_it_is_read(plan: LoadPlan):
    def end_early(fd: int, buffers: list[memoryview], offset: int) -> int:
        return 0

    with pytest.raises(TruncatedFile, match=r"the file ends at byte \d+"):
        load(plan, Arena.allocate(plan.num_bytes), open_reader=faulty(end_early))


def test_a_file_that_was_cut_after_planning(plan: LoadPlan):
    path = plan.extents[0].path
    num_bytes = path.stat().st_size
    os.truncate(path, num_bytes - 1)
    with pytest.raises(
        FileChanged, match=rf"{path}: the file was replaced .*{num_bytes} bytes then, {num_bytes - 1} now"
    ):
        load(plan, Arena.allocate(plan.num_bytes))


def test_a_file_that_was_replaced_after_planning(plan: LoadPlan):
    path = plan.extents[0].path
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))
    with pytest.raises(FileChanged, match="was replaced"):
        load(plan, Arena.allocate(plan.num_bytes))


def test_a_file_that_is_gone(plan: LoadPlan):
    plan.extents[0].path.unlink()
    with pytest.raises(FileChanged, match="was removed after its header was read"):
        load(plan, Arena.allocate(plan.num_bytes))


def test_files_are_closed_after_success_and_failure(plan: LoadPlan):
    before = len(os.listdir("/proc/self/fd"))
    load(plan, Arena.allocate(plan.num_bytes))
    os.utime(plan.extents[-1].path, ns=(0, 0))
    with pytest.raises(CheckpointError):
        load(plan, Arena.allocate(plan.num_bytes))
    assert len(os.listdir("/proc/self/fd")) == before


def test_cancelling_raises(plan: LoadPlan):
    cancel = threading.Event()

    def cancel_then_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        cancel.set()
        return os.preadv(fd, buffers, offset)

    with pytest.raises(TransferError, match="cancelled"):
        load(
            plan,
            Arena.allocate(plan.num_bytes),
            num_threads=1,
            chunk_size=4096,
            cancel=cancel,
            open_reader=faulty(cancel_then_read),
        )


def test_an_error_in_progress_reaches_the_caller(plan: LoadPlan):
    def give_up(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(plan, Arena.allocate(plan.num_bytes), progress=give_up)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("source", "target"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_device_loads_are_the_bytes_on_disk(
    layout: WeightLayout, make_checkpoint: MakeCheckpoint, source: str, target: str
):
    tensors = layout_tensors(FLOATS[source])
    plan = make_load_plan(layout, open_checkpoint(make_checkpoint(tensors)), target)
    with Arena.allocate(plan.num_bytes, "cuda") as arena:
        load(plan, arena, num_threads=3, chunk_size=4096)
        loaded = plan.tensors(arena)
    for name, tensor in expected_weights(tensors).items():
        assert torch.equal(loaded[name].cpu(), tensor.to(FLOATS[target])), name
