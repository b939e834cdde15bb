"""Blocks against brute force: every byte of every tensor goes to its place once, in the order of execution."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from flashtensors.memory.host_pool import PAGE_SLACK_BYTES
from flashtensors.transfer.blocks import make_blocks
from flashtensors.transfer.file_state import FileState
from flashtensors.transfer.load_plan import Extent, LoadPlan, PlannedTensor

CHUNK_BYTES = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def plans(draw: st.DrawFn) -> LoadPlan:
    """Tensors of several layers, packed into files in any order, at any alignment, some of them converted."""
    tensors = [
        (layer, draw(st.integers(0, 700)), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)))
        for layer in draw(st.lists(st.sampled_from([None, 0, 1, 2]), max_size=8).map(_in_layers))
    ]
    ends: dict[Path, int] = {}
    offsets: dict[int, tuple[Path, int]] = {}
    for index in draw(st.permutations(range(len(tensors)))):
        path = Path(draw(st.sampled_from(["a", "b"])))
        start = ends.get(path, draw(st.integers(8, 1100))) + draw(st.sampled_from([0, 0, 1, 600]))
        offsets[index] = path, start
        ends[path] = start + tensors[index][1] * tensors[index][2].itemsize
    extents: list[Extent] = []
    planned: list[PlannedTensor] = []
    arena_offset = 0
    for index, (layer, num_elements, source, target) in enumerate(tensors):
        path, file_offset = offsets[index]
        extents.append(
            Extent(
                name=str(index),
                path=path,
                file_offset=file_offset,
                num_bytes=num_elements * source.itemsize,
                arena_offset=arena_offset,
                source_dtype=source,
                target_dtype=target,
                layer=layer,
            )
        )
        planned.append(PlannedTensor(name=str(index), shape=(num_elements,), dtype=target, arena_offset=arena_offset))
        arena_offset += num_elements * target.itemsize
    return LoadPlan(
        extents=tuple(extents),
        planned_tensors=tuple(planned),
        files={path: FileState(num_bytes=end, modified_ns=0, inode=0) for path, end in ends.items()},
        num_bytes=arena_offset,
        file_bytes=sum(extent.num_bytes for extent in extents),
    )


def _in_layers(layers: list[int | None]) -> list[int | None]:
    """Embedding, layers in order, head."""
    decoder = sorted(layer for layer in layers if layer is not None)
    around = layers.count(None)
    return [None] * (around // 2) + decoder + [None] * (around - around // 2)


@given(plans())
def test_every_byte_goes_to_its_place_once(plan: LoadPlan):
    expected: dict[tuple[Path, int], int] = {}
    for extent in plan.extents:
        scale = extent.target_dtype.itemsize / extent.source_dtype.itemsize
        for byte in range(0, extent.num_bytes, extent.source_dtype.itemsize):
            expected[extent.path, extent.file_offset + byte] = extent.arena_offset + int(byte * scale)
    found: dict[tuple[Path, int], int] = {}
    for block in make_blocks(plan, CHUNK_BYTES).blocks:
        for segment in block.segments:
            step = segment.converted.source_dtype.itemsize if segment.converted else 1
            scale = segment.converted.target_dtype.itemsize / step if segment.converted else 1
            for byte in range(0, segment.num_bytes, step):
                place = block.path, block.file_offset + segment.block_offset + byte
                assert place not in found
                found[place] = segment.arena_offset + int(byte * scale)
    assert {place: found.get(place) for place in expected} == expected
    assert sum(block.used_bytes for block in make_blocks(plan, CHUNK_BYTES).blocks) == plan.file_bytes


@given(plans())
def test_blocks_are_whole_chunks_that_fit_a_page(plan: LoadPlan):
    blocks = make_blocks(plan, CHUNK_BYTES).blocks
    places = [(block.path, block.file_offset) for block in blocks]
    assert len(set(places)) == len(places), "no chunk is read twice"
    for block in blocks:
        file_bytes = plan.files[block.path].num_bytes
        assert block.file_offset % CHUNK_BYTES == 0
        assert min(CHUNK_BYTES, file_bytes - block.file_offset) <= block.num_bytes <= CHUNK_BYTES + PAGE_SLACK_BYTES
        assert block.file_offset + block.num_bytes <= file_bytes
        assert block.segments[-1].block_offset + block.segments[-1].num_bytes <= block.num_bytes


@given(plans())
def test_a_layers_bytes_are_in_the_blocks_up_to_its_stage(plan: LoadPlan):
    block_list = make_blocks(plan, CHUNK_BYTES)
    stages = [block.stage for block in block_list.blocks]
    assert stages == sorted(stages)
    for layer, last_stage in block_list.last_stages.items():
        landed = {
            (block.path, block.file_offset + segment.block_offset + byte)
            for block in block_list.blocks
            if block.stage <= last_stage
            for segment in block.segments
            for byte in range(segment.num_bytes)
        }
        for extent in plan.extents:
            if extent.layer == layer or (layer is None):
                wanted = range(extent.file_offset, extent.file_offset + extent.num_bytes)
                assert all((extent.path, byte) in landed for byte in wanted)


def test_neighbours_go_in_one_copy():
    common = {"path": Path("f"), "source_dtype": torch.uint8, "target_dtype": torch.uint8}
    extents = tuple(
        Extent(name=str(at), file_offset=100 + at, num_bytes=10, arena_offset=at, **common) for at in range(0, 50, 10)
    )
    plan = LoadPlan(
        extents=extents,
        planned_tensors=(),
        files={Path("f"): FileState(num_bytes=150, modified_ns=0, inode=0)},
        num_bytes=50,
        file_bytes=50,
    )
    (block,) = make_blocks(plan, CHUNK_BYTES).blocks
    assert [(segment.block_offset, segment.num_bytes) for segment in block.segments] == [(100, 50)]
