"""Products of few rows against fp64 on Hopper; elsewhere, that the kernel compiles to what it is written for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from .compile_apart import compile_apart
from .tolerances import assert_near

SCRIPT = Path(__file__).parent / "compile_linear_for_hopper.py"
SHARED_BYTES_OF_A_BLOCK = 232_448

SPLIT, WHOLE, UNEVEN, AWKWARD = (1024, 2048), (6144, 512), (18432, 256), (1000, 1352)
"""Outputs and inputs: tiles shared evenly, not shared, shared at any chunk, and neither dimension a multiple."""


@pytest.mark.parametrize(("num_rows", "num_outputs"), [(8, 1024), (16, 6144), (64, 1024), (64, 16384)])
def test_compiles_to_the_matrix_units_and_fits_shared_memory(num_rows: int, num_outputs: int, tmp_path: Path) -> None:
    found = compile_apart(SCRIPT, num_rows, num_outputs, cache=tmp_path)
    assert found["shared_bytes"] <= SHARED_BYTES_OF_A_BLOCK
    assert found["wgmma.mma_async"] > 0
    assert found["cp.async.bulk.tensor"] > 0
    assert found["griddepcontrol.wait"] > 0


def launch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from flashtensors.kernels.linear_hopper import can_launch, launch_linear

    if not can_launch(x, weight, bias):
        pytest.skip("not a Hopper device")
    return launch_linear(x, weight, bias)


def make(num_rows: int, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(num_rows)
    x, weight, bias = (
        torch.randn(size, generator=generator, device="cuda").to(dtype)
        for size in ((num_rows, shape[1]), shape, (shape[0],))
    )
    return x, weight * shape[1] ** -0.5, bias


def assert_is_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_near(out, expected, "product")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 11, 17, 63])
@pytest.mark.parametrize("shape", [SPLIT, WHOLE, UNEVEN, AWKWARD])
def test_products_are_those_of_fp64(shape: tuple[int, int], num_rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = make(num_rows, shape, dtype)
    assert_is_product(launch(x, weight), x, weight)
    assert_is_product(launch(x, weight, bias), x, weight, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SPLIT, UNEVEN])
def test_rows_that_lie_apart_and_weights_in_between(shape: tuple[int, int]) -> None:
    x, weight, _ = make(16, shape)
    padded = torch.full((16, shape[1] + 64), float("nan"), device="cuda", dtype=x.dtype)
    padded[:, : shape[1]] = x
    arena = torch.full((weight.numel() + 128,), float("nan"), device="cuda", dtype=x.dtype)
    inside = arena[64:-64].view(shape).copy_(weight)
    assert torch.equal(launch(padded[:, : shape[1]], inside), launch(x, weight))
    assert_is_product(launch(padded[1:8, : shape[1]], inside), x[1:8], weight)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SPLIT, WHOLE])
def test_not_a_number_stays_in_its_row_and_infinities_pass(shape: tuple[int, int]) -> None:
    x, weight, _ = make(4, shape)
    clean = launch(x, weight)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    out = launch(x, weight)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [SPLIT, UNEVEN, WHOLE])
def test_a_row_is_bitwise_the_same_in_any_run_and_beside_any_rows(shape: tuple[int, int]) -> None:
    x, weight, _ = make(64, shape)
    first = launch(x, weight)
    for _ in range(20):
        assert torch.equal(launch(x, weight), first)
    for num_rows in (1, 7, 8, 9, 16, 31, 33):
        assert torch.equal(launch(x[:num_rows], weight), first[:num_rows])


@pytest.mark.gpu
def test_products_in_a_graph_wait_for_each_other() -> None:
    """Each product reads what the one before it wrote, and shares its sums: nothing may start too soon."""
    square, wide, narrow = ((shape[0], shape[1]) for shape in ((2048, 2048), (8192, 2048), (2048, 8192)))
    weights = [make(1, shape)[1] for shape in (square, wide, narrow) * 8]
    x = torch.zeros(5, 2048, device="cuda", dtype=torch.bfloat16)

    def chain() -> Tensor:
        out = x
        for weight in weights:
            out = launch(out, weight)
        return out

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in range(10):
        x.copy_(make(5 + seed, square)[0][:5])
        graph.replay()
        expected = x
        for weight in weights:
            torch.cuda.synchronize()
            expected = launch(expected, weight)
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_streams_have_sums_of_their_own() -> None:
    x, weight, _ = make(16, SPLIT)
    expected = launch(x, weight)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    outs: list[Tensor] = []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(launch(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)
