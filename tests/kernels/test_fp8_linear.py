"""Products with weights in fp8 against fp64 of the values that the bytes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels.fp8 import FP8_DTYPE, FP8_MAX
from flashtensors.kernels.fp8_linear import BLOCK, dequantize, fp8_linear, round_rows_reference

from .tolerances import DEVICE, assert_near


def make_weight(num_outputs: int, num_inputs: int, *, has_blocks: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its scales, and the fp64 values that they stand for, scale by scale."""
    weight = (torch.randn(num_outputs, num_inputs) * 60).to(FP8_DTYPE)
    values = weight.double()
    if has_blocks:
        scale = torch.rand(-(-num_outputs // BLOCK), -(-num_inputs // BLOCK)) + 0.5
        for row in range(num_outputs):
            for column in range(0, num_inputs, BLOCK):
                values[row, column : column + BLOCK] *= scale[row // BLOCK, column // BLOCK].double()
    else:
        scale = torch.rand(num_outputs, 1) + 0.5
        values *= scale.double()
    return weight.to(DEVICE), (scale / 60).to(DEVICE), (values / 60).to(DEVICE)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_blocks", [False, True])
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), [(3, 64, 48), (1, 300, 140), (0, 128, 256)])
def test_fp32_rows_meet_the_exact_weight(
    num_rows: int, num_inputs: int, num_outputs: int, has_blocks: bool, has_bias: bool
) -> None:
    weight, scale, values = make_weight(num_outputs, num_inputs, has_blocks=has_blocks)
    x = torch.randn(num_rows, num_inputs + 5, device=DEVICE)[:, :num_inputs]
    bias = torch.randn(num_outputs, device=DEVICE) if has_bias else None
    expected = x.double() @ values.T + (0 if bias is None else bias.double())
    torch.testing.assert_close(fp8_linear(x, weight, scale, bias).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("has_blocks", [False, True])
def test_a_widened_weight_is_rounded_once(has_blocks: bool) -> None:
    weight, scale, values = make_weight(200, 260, has_blocks=has_blocks)
    assert_near(dequantize(weight, scale, torch.bfloat16), values, "elementwise")


def test_rows_are_rounded_to_the_nearest_with_a_scale_of_their_own() -> None:
    x = torch.randn(4, 96) * torch.tensor([1.0, 1e-6, 1e4, 0.0])[:, None]
    rounded, scale = round_rows_reference(x)
    assert rounded.dtype == FP8_DTYPE
    assert scale.shape == (4, 1)
    torch.testing.assert_close(scale[:3, 0], x[:3].abs().amax(1) / FP8_MAX)
    assert (rounded[3].float() == 0).all()
    unit = rounded.float()[:3].abs().clamp(min=2**-6).log2().floor().exp2() / 8  # between neighbours of e4m3
    error = (rounded.float() * scale - x)[:3].abs()
    assert (error <= 0.51 * unit * scale[:3]).all()


@pytest.mark.parametrize("fault", ["dtype", "scale", "bias", "stride", "inputs"])
def test_what_does_not_fit_is_refused_by_name(fault: str) -> None:
    weight, scale, _ = make_weight(64, 256, has_blocks=False)
    x, bias = torch.randn(2, 256, device=DEVICE), torch.randn(64, device=DEVICE)
    says = {"dtype": "weight is", "scale": "scale is", "bias": "bias is", "stride": "weight has", "inputs": "x is"}
    if fault == "dtype":
        weight = weight.float()
    elif fault == "scale":
        scale = scale[:-1]
    elif fault == "bias":
        bias = bias.double()
    elif fault == "stride":
        weight = torch.empty(256, 64, dtype=FP8_DTYPE, device=DEVICE).T
    else:
        x = x[:, :-1]
    with pytest.raises(ConfigError, match=says[fault]):
        fp8_linear(x, weight, scale, bias)
