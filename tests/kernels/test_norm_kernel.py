"""The Triton norms against fp64, and bit for bit against the references where both round alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels.norm import gemma_rms_norm_reference, rms_norm_reference

from .tolerances import DEVICE, DTYPES, assert_near

pytest.importorskip("triton")
from flashtensors.kernels.norm_kernel import MAX_ROW_ELEMENTS, launch_add_rms_norm, launch_rms_norm

EPS = 1e-5
SHAPES = [(3, 64), (1, 576), (40, 128), (2, 3000), (0, 64)]


def make(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, dtype=torch.float32) * 3).to(device=DEVICE, dtype=dtype)


def expected(x: Tensor, weight: Tensor, is_gemma: bool) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * (is_gemma + weight)


@pytest.mark.parametrize("programs", [None, 1])
@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_right(shape: tuple[int, ...], dtype: torch.dtype, is_gemma: bool, programs: int | None) -> None:
    x, weight = make(*shape, dtype=dtype), make(shape[-1], dtype=dtype)
    out = launch_rms_norm(x, weight, EPS, is_gemma=is_gemma, programs_per_multiprocessor=programs)
    assert_near(out, expected(x, weight, is_gemma), "elementwise" if is_gemma else "two roundings")


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_inside_a_fused_projection_are_read_in_place(dtype: torch.dtype) -> None:
    fused, weight = make(5, 7 * 96, dtype=dtype), make(96, dtype=dtype)
    fused[:, : 2 * 96] = fused[:, 5 * 96 :] = torch.nan
    heads = fused.unflatten(-1, (7, 96))[:, 2:5]
    out = launch_rms_norm(heads, weight, EPS)
    assert out.is_contiguous()
    assert_near(out, expected(heads, weight, False), "two roundings")


@pytest.mark.parametrize("shape", [(4, 6, 5, 32), (6, 32)])
def test_any_strides_are_read(shape: tuple[int, ...]) -> None:
    x = make(*reversed(shape), dtype=torch.float32).permute(*reversed(range(len(shape))))
    weight = make(32, dtype=torch.float32)
    assert_near(launch_rms_norm(x, weight, EPS), expected(x, weight, False), "two roundings")
    if x.dim() == 2:
        residual = make(*shape, dtype=torch.float32)
        total = residual.double() + x.double()
        assert_near(launch_add_rms_norm(x, residual, weight, EPS), expected(total, weight, False), "two roundings")


@pytest.mark.parametrize("programs", [None, 2])
@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_norm_is_right_and_updates_the_residual(
    shape: tuple[int, ...], dtype: torch.dtype, is_gemma: bool, programs: int | None
) -> None:
    update, weight = make(*shape, dtype=dtype), make(shape[-1], dtype=dtype)
    wide = make(shape[0], shape[1] + 16, dtype=dtype)
    residual, padding = wide[:, : shape[1]], wide[:, shape[1] :].clone()
    total = residual + update
    out = launch_add_rms_norm(
        update, residual, weight, EPS, is_gemma=is_gemma, out=update, programs_per_multiprocessor=programs
    )
    assert out is update
    assert torch.equal(residual, total)
    assert torch.equal(wide[:, shape[1] :], padding)
    assert_near(out, expected(total, weight, is_gemma), "elementwise" if is_gemma else "two roundings")


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32])
@pytest.mark.parametrize(("is_gemma", "reference"), [(False, rms_norm_reference), (True, gemma_rms_norm_reference)])
def test_norm_rounds_where_the_reference_does(is_gemma: bool, reference: Any, dtype: torch.dtype) -> None:
    x, weight = make(64, 512, dtype=dtype), make(512, dtype=dtype)
    out, theirs = launch_rms_norm(x, weight, EPS, is_gemma=is_gemma), reference(x, weight, EPS)
    assert (out != theirs).float().mean() < 1e-3  # fp32 sums in another order move a few across a rounding edge


def test_what_does_not_fit_is_refused() -> None:
    x, weight = make(2, 64, dtype=torch.float32), make(64, dtype=torch.float32)
    with pytest.raises(ConfigError, match="out is"):
        launch_rms_norm(x, weight, EPS, out=torch.empty_like(x.half()))
    long = torch.empty(1, MAX_ROW_ELEMENTS + 1, device=DEVICE)
    with pytest.raises(ConfigError, match="too long"):
        launch_rms_norm(long, long[0], EPS)
