"""Projections with packed weights against fp64."""

from __future__ import annotations

import pytest
import torch

from flashtensors.kernels.linear import linear, linear_reference, pack_weight

from .tolerances import CPU_DTYPES, assert_near


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), [(1, 64, 96), (33, 20, 7), (0, 16, 24), (5, 1, 1)])
def test_a_packed_weight_multiplies_as_a_plain_one(
    num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(num_rows, num_inputs + 3, dtype=dtype)[:, :num_inputs]
    weight, bias = torch.randn(num_outputs, num_inputs, dtype=dtype), torch.randn(num_outputs, dtype=dtype)
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    for out in (
        linear(x, pack_weight(weight), bias if has_bias else None),
        linear(x, weight, bias if has_bias else None),
        linear_reference(x, weight, bias if has_bias else None),
    ):
        assert out.dtype == dtype
        assert_near(out, expected, "product")


def test_packing_leaves_the_weight_alone() -> None:
    weight = torch.randn(48, 32)
    before = weight.clone()
    x, packed = torch.randn(2, 32), pack_weight(weight)
    expected = linear(x, packed)
    assert torch.equal(weight, before)
    if packed is not weight:
        weight.zero_()
        assert torch.equal(linear(x, packed), expected)


@pytest.mark.gpu
def test_a_gpu_keeps_the_weight_itself() -> None:
    weight = torch.randn(48, 32, device="cuda")
    assert pack_weight(weight) is weight


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65])
def test_a_gpu_multiplies_any_number_of_rows(num_rows: int) -> None:
    x = torch.randn(num_rows, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16) / 32
    expected = x.double() @ weight.double().T
    for rows in (x, x.t().contiguous().t(), x.view(num_rows, 1, 1024)):
        out = linear(rows, weight).view(num_rows, 2048)
        assert_near(out, expected, "product")
