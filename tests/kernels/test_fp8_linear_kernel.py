"""The Triton products in fp8 against fp64 of the same rounded rows and weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtensors.kernels.fp8_linear import fp8_linear, round_rows_reference

from .test_fp8_linear import make_weight
from .tolerances import DEVICE, DTYPES, assert_near

pytest.importorskip("triton")
from flashtensors.kernels.fp8_linear_kernel import Tiling, choose_tiling, launch_multiply, launch_round_rows

SHAPES = [(1, 256, 64), (5, 512, 96), (17, 272, 80), (33, 300, 20), (130, 256, 200)]


def expected(rounded: Tensor, x_scale: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    product = (rounded.double() * x_scale.double()) @ values.T
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SHAPES)
def test_the_product_is_right(
    num_rows: int, num_inputs: int, num_outputs: int, dtype: torch.dtype, num_splits: int, has_blocks: bool,
    has_bias: bool,
) -> None:  # fmt: skip
    weight, scale, values = make_weight(num_outputs, num_inputs, has_blocks=has_blocks)
    rounded, x_scale = round_rows_reference(torch.randn(num_rows, num_inputs, device=DEVICE) * 0.1)
    bias = torch.randn(num_outputs, device=DEVICE).to(dtype) if has_bias else None
    chosen = choose_tiling(num_rows, num_inputs, num_outputs, 132, has_row_scales=not has_blocks)
    out = launch_multiply(rounded, x_scale, weight, scale, bias, dtype, chosen._replace(num_splits=num_splits))
    assert out.dtype == dtype
    assert_near(out, expected(rounded, x_scale, values, bias), "two roundings" if dtype != torch.float32 else "mixture")


def make_rows(dtype: torch.dtype) -> Tensor:
    x = torch.randn(4, 131, device=DEVICE) * torch.tensor([1.0, 1e-3, 30.0, 0.0], device=DEVICE)[:, None]
    return x.to(dtype)[:, :-3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_gets_the_scale_of_its_largest_value(dtype: torch.dtype) -> None:
    x = make_rows(dtype)
    torch.testing.assert_close(launch_round_rows(x)[1], round_rows_reference(x)[1], rtol=1e-6, atol=0.0)


@pytest.mark.gpu  # the interpreter forgets to carry from the mantissa to the exponent
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_rounded_as_the_reference_rounds_them(dtype: torch.dtype) -> None:
    x = make_rows(dtype)
    rounded, expected_rounded = launch_round_rows(x)[0], round_rows_reference(x)[0]
    # a quotient in the middle between two values may fall to either side
    assert (rounded.view(torch.uint8) == expected_rounded.view(torch.uint8)).float().mean() > 0.98
    torch.testing.assert_close(rounded.float(), expected_rounded.float(), rtol=0.13, atol=2**-9)


@pytest.mark.gpu  # nor does it know fp8's NaN
def test_what_is_no_number_stays_none() -> None:
    weight, scale, _ = make_weight(64, 256, has_blocks=False)
    x = torch.randn(3, 256, device=DEVICE)
    x[1, 7] = torch.nan
    rounded, x_scale = launch_round_rows(x)
    out = launch_multiply(rounded, x_scale, weight, scale, None, torch.float32, Tiling(64, 16, 128, 1, 4, 4))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("num_rows", "num_inputs", "num_outputs"), [(8, 12288, 4096), (64, 4096, 4096), (16, 2048, 1024)]
)
def test_splits_cover_all_inputs_and_fill_the_device(num_rows: int, num_inputs: int, num_outputs: int) -> None:
    tiling = choose_tiling(num_rows, num_inputs, num_outputs, 132, has_row_scales=True)
    num_programs = -(-num_outputs // tiling.block_outputs) * tiling.num_splits
    assert tiling.num_splits > 1
    assert num_inputs // tiling.num_splits >= 512
    assert num_programs >= 64


@pytest.mark.gpu
@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_door_is_right_and_the_same_in_a_graph(dtype: torch.dtype, num_rows: int, has_blocks: bool) -> None:
    weight, scale, values = make_weight(640, 1024, has_blocks=has_blocks)
    x = (torch.randn(num_rows, 1024, device=DEVICE) * 0.1).to(dtype)
    bias = torch.randn(640, device=DEVICE).to(dtype)
    out = fp8_linear(x, weight, scale, bias)
    # rounded by the same kernel: a quotient in the middle between two values may fall to either side
    assert_near(out, expected(*launch_round_rows(x), values, bias), "fp8 product")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_linear(x, weight, scale, bias)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, out)
