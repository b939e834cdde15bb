"""What is said of a load beforehand is what the load then does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.layout import WeightLayout
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.memory.arena import Arena
from flashtensors.memory.host_pool import PAGE_SLACK_BYTES, HostPool
from flashtensors.transfer.load_plan import LoadPlan, make_load_plan
from flashtensors.transfer.pipeline import load
from flashtensors.transfer.probe import shared_probe
from flashtensors.transfer.read_preview import preview_reads

CHUNK_BYTES = 64 * 1024
SHAPE = (512, 512)
TENSOR_BYTES = 4 * 512 * 512


@pytest.fixture
def plan(make_checkpoint: Callable[..., Path], make_layout: Callable[..., WeightLayout]) -> LoadPlan:
    """One tensor in each of two files."""
    folder = make_checkpoint({"a": torch.ones(SHAPE)}, {"b": torch.ones(SHAPE)})
    layout = make_layout(a={"a": SHAPE}, b={"b": SHAPE})
    return make_load_plan(layout, open_checkpoint(folder), "float32")


def read_by_pages(plan: LoadPlan) -> str:
    """The readers of a load as to a GPU."""
    page_bytes = CHUNK_BYTES + PAGE_SLACK_BYTES
    with (
        HostPool(8 * page_bytes, chunk_bytes=CHUNK_BYTES, num_threads=1) as pool,
        Arena.allocate(plan.num_bytes) as arena,
    ):
        return load(plan, arena, pool=pool, num_threads=2).reader


def drop_from_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("num_dropped", [0, 1, 2])
def test_by_pages_what_the_page_cache_lacks_is_read_directly(plan: LoadPlan, num_dropped: int):
    for index, path in enumerate(plan.files):
        path.read_bytes()
        if index < num_dropped:
            drop_from_page_cache(path)
    if not shared_probe().file_system(next(iter(plan.files))).accepts_direct:
        pytest.skip("this file system is read through the page cache")
    preview = preview_reads(plan, is_in_place=False, chunk_bytes=CHUNK_BYTES)
    assert preview == {
        name: num_files * TENSOR_BYTES
        for name, num_files in (("direct", num_dropped), ("buffered", 2 - num_dropped))
        if num_files
    }
    assert read_by_pages(plan) == " and ".join(preview)


def test_in_place_all_goes_through_the_page_cache(plan: LoadPlan):
    for path in plan.files:
        drop_from_page_cache(path)
    assert preview_reads(plan, is_in_place=True, chunk_bytes=CHUNK_BYTES) == {"buffered": 2 * TENSOR_BYTES}
    with Arena.allocate(plan.num_bytes) as arena:
        assert load(plan, arena).reader == "buffered"
