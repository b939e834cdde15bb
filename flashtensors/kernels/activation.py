"""Gated activations on the fused output of the gate and up projections.

    silu_mul:       gate * sigmoid(gate) * up
    gelu_tanh_mul:  gelu(gate) * up,  gelu(g) = g/2 * (1 + tanh(sqrt(2/π) * (g + 0.044715 g³)))

The activation is rounded to the dtype of its input before the product, as in transformers; on CUDA only the product is.

Shapes: T rows, M elements of gate, and of up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError


def silu_mul(gate_up: Tensor) -> Tensor:
    """`[T, M]` from `[T, 2 M]`, gate first; an odd length is a `ConfigError`."""
    _check(gate_up)
    if gate_up.is_cuda:
        from .activation_kernel import launch_gated_product

        return launch_gated_product(gate_up, is_gelu=False)
    gate_TM, up_TM = gate_up.chunk(2, -1)
    return F.silu(gate_TM).mul_(up_TM)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """`[T, M]` from `[T, 2 M]`, gate first; an odd length is a `ConfigError`."""
    _check(gate_up)
    if gate_up.is_cuda:
        from .activation_kernel import launch_gated_product

        return launch_gated_product(gate_up, is_gelu=True)
    gate_TM, up_TM = gate_up.chunk(2, -1)
    return F.gelu(gate_TM, approximate="tanh").mul_(up_TM)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """`silu_mul` by its definition."""
    gate_TM, up_TM = gate_up.chunk(2, -1)
    return gate_TM * torch.sigmoid(gate_TM) * up_TM


def gelu_tanh_mul_reference(gate_up: Tensor) -> Tensor:
    """`gelu_tanh_mul` by its definition."""
    gate_TM, up_TM = gate_up.chunk(2, -1)
    inner_TM = math.sqrt(2 / math.pi) * (gate_TM + 0.044715 * gate_TM**3)
    return 0.5 * gate_TM * (1 + torch.tanh(inner_TM)) * up_TM


def _check(gate_up: Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ConfigError(
            f"gate_up is {list(gate_up.shape)}, but its last dimension must be even: gate, then up", param="gate_up"
        )
