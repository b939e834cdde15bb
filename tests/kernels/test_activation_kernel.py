"""The Triton activations against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtensors.errors import ConfigError

from .tolerances import DEVICE, DTYPES, assert_near

pytest.importorskip("triton")
from flashtensors.kernels.activation_kernel import launch_gated_product

SHAPES = [(3, 64), (1, 1536), (5, 1000), (2, 3, 72), (0, 32)]


def make(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 4).to(device=DEVICE, dtype=dtype)


def expected(gate_up: Tensor, is_gelu: bool) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return (F.gelu(gate, approximate="tanh") if is_gelu else F.silu(gate)) * up


@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product_is_right(shape: tuple[int, ...], dtype: torch.dtype, is_gelu: bool) -> None:
    gate_up = make(*shape[:-1], 2 * shape[-1], dtype=dtype)
    assert_near(launch_gated_product(gate_up, is_gelu=is_gelu), expected(gate_up, is_gelu), "elementwise")


@pytest.mark.parametrize("is_gelu", [False, True])
def test_strided_rows_and_a_given_output(is_gelu: bool) -> None:
    wide = make(4, 2 * 48 + 7, dtype=torch.float32)
    wide[:, -7:] = torch.nan
    frame = torch.full((4, 60), 7.0, device=DEVICE)
    out = launch_gated_product(wide[:, :-7], is_gelu=is_gelu, out=frame[:, :48])
    assert_near(out, expected(wide[:, :-7], is_gelu), "elementwise")
    assert (frame[:, 48:] == 7.0).all()
    columns = make(96, 4, dtype=torch.float32).T
    assert_near(launch_gated_product(columns, is_gelu=is_gelu), expected(columns, is_gelu), "elementwise")


@pytest.mark.parametrize("is_gelu", [False, True])
def test_far_ends_neither_overflow_nor_vanish(is_gelu: bool) -> None:
    gate = torch.tensor([-1e30, -200.0, -10.0, -0.0, 200.0, 1e6], device=DEVICE)
    out = launch_gated_product(torch.cat((gate, torch.ones_like(gate)))[None], is_gelu=is_gelu)[0]
    assert torch.isfinite(out).all()
    assert torch.equal(out[-2:], gate[-2:])
    assert (out[:2] == 0.0).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="out is"):
        launch_gated_product(torch.zeros(2, 8, device=DEVICE), is_gelu=False, out=torch.zeros(2, 8, device=DEVICE))
