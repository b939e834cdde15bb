"""Norms against fp64, and bit for bit against the modules of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flashtensors.errors import ConfigError
from flashtensors.kernels.norm import (
    NormKernel,
    add_rms_norm,
    add_rms_norm_reference,
    gemma_rms_norm,
    gemma_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

from .tolerances import CPU_DTYPES, DEVICE, assert_near

EPS = 1e-5
SHAPES = [(3, 64), (1, 576), (5, 9, 80), (0, 32)]
KERNELS = [(rms_norm, rms_norm_reference, 0.0), (gemma_rms_norm, gemma_rms_norm_reference, 1.0)]


def expected(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * (offset + weight)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel", "reference", "offset"), KERNELS)
def test_norms_are_right(
    kernel: NormKernel, reference: NormKernel, offset: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight = torch.randn(shape, dtype=dtype) * 3, torch.randn(shape[-1], dtype=dtype)
    before = x.clone()
    for norm in (kernel, reference):
        out = norm(x, weight, EPS)
        assert out.dtype == dtype
        assert_near(out, expected(x, weight, offset), "two roundings")
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize(("kernel", "module_class"), [(rms_norm, LlamaRMSNorm), (gemma_rms_norm, Gemma3RMSNorm)])
def test_norms_round_as_transformers_does(kernel: NormKernel, module_class: type, dtype: torch.dtype) -> None:
    module = module_class(96, eps=EPS).to(dtype)
    module.weight.data.normal_()
    x = torch.randn(7, 96, dtype=dtype) * 3
    out, theirs = kernel(x, module.weight.data, EPS), module(x).detach()
    if dtype == torch.float32:
        torch.testing.assert_close(out, theirs, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(out, theirs)


def test_norms_read_heads_inside_a_fused_projection() -> None:
    qkv, weight = torch.randn(4, 6, 32), torch.randn(32)
    assert torch.equal(rms_norm(qkv[:, 1:4], weight, EPS), rms_norm(qkv[:, 1:4].contiguous(), weight, EPS))


@pytest.mark.parametrize("norm", [rms_norm, gemma_rms_norm])
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_add_norm_updates_the_residual(norm: NormKernel, dtype: torch.dtype) -> None:
    update, residual, weight = (torch.randn(shape, dtype=dtype) for shape in ((5, 48), (5, 48), (48,)))
    expected_norm, expected_sum = add_rms_norm_reference(update, residual, weight, EPS, norm)
    out = add_rms_norm(update, residual, weight, EPS, norm)
    assert torch.equal(residual, expected_sum)
    assert torch.equal(out, expected_norm)


@pytest.mark.parametrize("norm", [rms_norm, gemma_rms_norm])
def test_what_does_not_fit_is_refused(norm: NormKernel) -> None:
    x, weight = torch.randn(2, 64, device=DEVICE), torch.randn(64, device=DEVICE)
    for wrong in (weight[:32], weight[:1], x, weight.repeat(2)[::2], weight.to("meta")):
        with pytest.raises(ConfigError, match=r"^weight_E is .* must be contiguous torch.float32 \[64\]"):
            norm(x, wrong, EPS)
        with pytest.raises(ConfigError, match=r"^weight_E is"):
            add_rms_norm(x, x.clone(), wrong, EPS, norm)
    for wrong in (x[:1].clone(), x.half(), x.to("meta")):
        with pytest.raises(ConfigError, match=r"residual is .* must be as the update"):
            add_rms_norm(x, wrong, weight, EPS, norm)
    with pytest.raises(ConfigError, match=r"residual is .* must be as the update"):
        add_rms_norm(x[:1], x.clone(), weight, EPS, norm)  # would be broadcast
    with pytest.raises(ConfigError, match="updated in place"):
        add_rms_norm(x, torch.zeros(64, 2, device=DEVICE).T, weight, EPS, norm)
