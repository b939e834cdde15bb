"""Gated activations against fp64, and bit for bit against the composition in transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from flashtensors.errors import ConfigError
from flashtensors.kernels.activation import gelu_tanh_mul, gelu_tanh_mul_reference, silu_mul, silu_mul_reference

from .tolerances import CPU_DTYPES, DEVICE, assert_near

Activation = Callable[[Tensor], Tensor]
KERNELS = [(silu_mul, silu_mul_reference, "silu"), (gelu_tanh_mul, gelu_tanh_mul_reference, "gelu_pytorch_tanh")]


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (1, 3072), (2, 18), (0, 8)])
@pytest.mark.parametrize(("kernel", "reference", "name"), KERNELS)
def test_activations_are_right(
    kernel: Activation, reference: Activation, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    fused = torch.randn(shape[0], shape[1] + 6, dtype=dtype)[:, : shape[1]] * 4  # rows are strided
    before = fused.clone()
    out = kernel(fused)
    assert out.dtype == dtype
    assert_near(out, reference(fused.double()), "two roundings")
    gate, up = fused.chunk(2, -1)
    assert torch.equal(out, ACT2FN[name](gate) * up)
    assert torch.equal(fused, before)


@pytest.mark.parametrize("kernel", [silu_mul, gelu_tanh_mul])
def test_an_odd_length_is_refused(kernel: Activation) -> None:
    with pytest.raises(ConfigError, match=r"gate_up is \[2, 3\], but its last dimension must be even"):
        kernel(torch.zeros(2, 3, device=DEVICE))
