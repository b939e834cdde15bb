"""y = x (v ∘ s)ᵀ + b: a product with a weight in fp8 (e4m3), `v` times scales `s` of its rows or of its blocks.

Matrix units multiply fp8 by fp8, so rows of x are rounded too, each with a scale of its own, as they come:

    t_r = max_i |x_ri| / 448        u_ri = round(x_ri / t_r)        y_ro = t_r s_o sum_i u_ri v_oi + b_o

To widen the weight in registers instead, and multiply by x as it is, was tried on Hopper: slower at any number of rows,
as widening keeps other units busy than the ones that wait. Devices without fp8 arithmetic (before Ada and Hopper), and
fp32 models, widen the whole weight for each product: exact, and slow.

Shapes: T rows, I inputs, O outputs; scales are `[O, 1]`, or `[O / 128, I / 128]` rounded up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .device_traits import has_fp8
from .fp8 import FP8_DTYPE, FP8_MAX

MIN_SCALE = 2.0**-120
"""Of rows of zeros; nothing that is scaled by it overflows."""
BLOCK = 128
"""Rows and columns of a block with a scale of its own."""


def fp8_linear(x_TI: Tensor, weight_OI: Tensor, scale: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`[T, O]` in the dtype of `x_TI`; the same bits for the same arguments.

    Args:
        x_TI: Last stride 1.
        weight_OI: `FP8_DTYPE`, contiguous.
        scale: fp32, contiguous: `[O, 1]`, or one for each `BLOCK` x `BLOCK` elements.
        bias_O: Dtype of `x_TI`.

    Raises:
        ConfigError: An argument whose shape, dtype, stride or device does not fit, by name.
    """
    _check(x_TI, weight_OI, scale, bias_O)
    if x_TI.is_cuda and x_TI.dtype != torch.float32 and has_fp8(x_TI.device):
        from .fp8_linear_kernel import launch_fp8_linear

        return launch_fp8_linear(x_TI, weight_OI, scale, bias_O)
    return fp8_linear_reference(x_TI, weight_OI, scale, bias_O)


def fp8_linear_reference(x_TI: Tensor, weight_OI: Tensor, scale: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`fp8_linear` with the weight widened to the dtype of `x_TI`."""
    return F.linear(x_TI, dequantize(weight_OI, scale, x_TI.dtype), bias_O)


def round_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in `FP8_DTYPE`, and the fp32 scale `[T, 1]` of each, as devices with fp8 arithmetic multiply them."""
    if x_TI.is_cuda and has_fp8(x_TI.device):
        from .fp8_linear_kernel import launch_round_rows

        return launch_round_rows(x_TI)
    return round_rows_reference(x_TI)


def round_rows_reference(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """`round_rows` in torch."""
    x_TI = x_TI.to(torch.float32)
    scale_T1 = x_TI.abs().amax(1, keepdim=True).div_(FP8_MAX).clamp_(min=MIN_SCALE)
    return (x_TI / scale_T1).clamp_(-FP8_MAX, FP8_MAX).to(FP8_DTYPE), scale_T1


def dequantize(weight_OI: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that `weight_OI` and `scale` stand for, rounded to `dtype` once."""
    num_rows, num_columns = weight_OI.shape
    if scale.shape[0] != num_rows:
        scale = scale.repeat_interleave(BLOCK, 0)[:num_rows]
    if scale.shape[1] not in (1, num_columns):
        scale = scale.repeat_interleave(BLOCK, 1)[:, :num_columns]
    return weight_OI.to(torch.float32).mul_(scale).to(dtype)


def _check(x_TI: Tensor, weight_OI: Tensor, scale: Tensor, bias_O: Tensor | None) -> None:
    num_outputs, num_inputs = weight_OI.shape if weight_OI.dim() == 2 else (0, 0)
    num_rows = x_TI.shape[0] if x_TI.dim() == 2 else 0
    by_row, by_block = (num_outputs, 1), (-(-num_outputs // BLOCK), -(-num_inputs // BLOCK))
    wanted = {
        "weight": (weight_OI, (num_outputs, num_inputs), FP8_DTYPE),
        "x": (x_TI, (num_rows, num_inputs), x_TI.dtype),
        "scale": (scale, by_block if scale.shape == by_block else by_row, torch.float32),
        "bias": (bias_O, (num_outputs,), x_TI.dtype),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x_TI.device:
            raise ConfigError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, but beside weight "
                f"{list(weight_OI.shape)} it must be {dtype} {list(shape)} on {x_TI.device}"
            )
        if not (tensor.is_contiguous() or (name == "x" and tensor.stride(1) == 1)):
            raise ConfigError(f"{name} has strides {tensor.stride()}, but it must be contiguous")
