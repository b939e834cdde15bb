"""The Triton mixture of experts against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .launch_options import launch_options
from .moe_cases import make_case
from .tolerances import DEVICE, DTYPES, assert_near

pytest.importorskip("triton")
from flashtensors.kernels import moe_kernel
from flashtensors.kernels.moe_kernel import DECODE_TILES, MoeTiles, Tiles, choose_tiles, launch_moe
from flashtensors.kernels.moe_sort_kernel import launch_sort

SMALL_TILES = MoeTiles(
    block_m=16,
    gate_up=Tiles(block_n=16, block_k=32, num_warps=4, num_stages=2, group_tiles=2),
    down=Tiles(block_n=16, block_k=16, num_warps=4, num_stages=2, group_tiles=3),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16])
def test_few_rows(num_rows: int, dtype: torch.dtype) -> None:
    case = make_case(num_rows, dtype=dtype)
    assert_near(launch_moe(*case.operands), case.expected(), "mixture")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [17, 61])
def test_many_rows(num_rows: int, dtype: torch.dtype) -> None:
    case = make_case(num_rows, dtype=dtype)
    assert_near(launch_moe(*case.operands, tiles=SMALL_TILES), case.expected(), "mixture")


@pytest.mark.parametrize("is_decode", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden", "inner"), [(3, 1, 33, 17), (9, 8, 64, 32), (2, 1, 16, 100), (128, 8, 32, 16)]
)
def test_awkward_shapes(num_experts: int, top_k: int, hidden: int, inner: int, is_decode: bool) -> None:
    case = make_case(13, num_experts=num_experts, top_k=top_k, hidden=hidden, inner=inner)
    tiles = DECODE_TILES if is_decode else SMALL_TILES
    assert_near(launch_moe(*case.operands, tiles=tiles, is_decode=is_decode), case.expected(), "mixture")


@pytest.mark.parametrize("num_rows", [5, 20])
def test_strided_rows_and_a_given_output(num_rows: int) -> None:
    case = make_case(num_rows, row_stride=47)
    out = torch.full((num_rows, case.x.shape[1]), torch.nan, device=DEVICE)
    assert launch_moe(*case.operands, out=out) is out
    assert_near(out, case.expected(), "mixture")


@pytest.mark.parametrize("num_rows", [5, 20])
def test_a_row_that_is_not_a_number_stays_alone(num_rows: int) -> None:
    case = make_case(num_rows)
    case.x[3] = torch.nan
    out, expected = launch_moe(*case.operands), case.expected()
    others = torch.arange(num_rows, device=DEVICE) != 3
    assert out[3].isnan().all()
    assert_near(out[others], expected[others], "mixture")


def test_tiles_with_few_pairs_are_computed_with_half_the_lines() -> None:
    case = make_case(45, num_experts=5, top_k=2)
    counts = torch.bincount(case.expert_ids.flatten()).tolist()
    assert any(0 < count % 32 <= 16 for count in counts)
    assert any(count % 32 > 16 for count in counts)
    tiles = replace(SMALL_TILES, block_m=32, has_halves=True)
    assert_near(launch_moe(*case.operands, tiles=tiles), case.expected(), "mixture")


@pytest.mark.parametrize("block_m", [4, 16])
@pytest.mark.parametrize("num_rows", [1, 300, 2100])
def test_pairs_are_sorted_into_tiles(num_rows: int, block_m: int) -> None:
    ids = make_case(num_rows, num_experts=40, top_k=8).expert_ids
    pairs = launch_sort(ids, 40, block_m=block_m)
    counts = torch.bincount(ids.flatten(), minlength=40)
    assert (pairs.ends_X - pairs.starts_X).tolist() == counts.tolist()
    assert pairs.ends_X.tolist() == counts.cumsum(0).tolist()
    assert pairs.tile_ends_X.tolist() == ((counts + block_m - 1) // block_m).cumsum(0).tolist()
    assert int(pairs.tile_ends_X[-1]) <= pairs.max_tiles
    assert pairs.pairs_P.sort().values.tolist() == list(range(8 * num_rows))
    assert (ids.flatten()[pairs.pairs_P.long()].diff() >= 0).all()


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    sizes = [choose_tiles(num_rows * 8, 128).block_m for num_rows in (17, 256, 600, 1024, 4096)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4


@pytest.mark.parametrize(("shared_bytes", "num_stages"), [(227 << 10, 4), (163 << 10, 4), (99 << 10, 3), (64 << 10, 2)])
def test_fewer_steps_are_under_way_where_a_program_has_less_shared_memory(
    shared_bytes: int, num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_kernel, "shared_memory_bytes", lambda device: shared_bytes)
    case, tiles = make_case(20, hidden=256, inner=128), choose_tiles(1 << 20, 1)
    options = launch_options(monkeypatch, moe_kernel, "_multiply", lambda: launch_moe(*case.operands, tiles=tiles))
    assert options["num_stages"] == num_stages


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [4, 64, 3000])
def test_sizes_of_models_are_right_and_the_same_each_time(num_rows: int) -> None:
    case = make_case(num_rows, num_experts=64, top_k=8, hidden=1024, inner=384, dtype=torch.bfloat16)
    first, second = launch_moe(*case.operands), launch_moe(*case.operands)
    assert torch.equal(first, second)
    rows = torch.randperm(num_rows)[:16].tolist()
    x, gate_up, down, ids, weights = case.operands
    some = type(case)(x=x[rows], gate_up=gate_up, down=down, expert_ids=ids[rows], weights=weights[rows])
    assert_near(first[rows], some.expected(), "mixture")


@pytest.mark.gpu
def test_a_graph_replays_with_other_rows_and_experts() -> None:
    first, second = make_case(40), make_case(40, row_stride=40)
    second.expert_ids.copy_(first.expert_ids.flip(0))
    second.x.mul_(-1.0)
    launch_moe(*first.operands)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch_moe(*first.operands)
    expected = second.expected()
    for captured, new in zip(first.operands, second.operands, strict=True):
        captured.copy_(new)
    graph.replay()
    assert_near(out, expected, "mixture")
