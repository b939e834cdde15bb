"""Root-mean-square norms (Zhang and Sennrich, 2019), with the roundings of transformers.

    rms_norm:        w * round(x / sqrt(mean(x²) + eps))         round: to the dtype of x
    gemma_rms_norm:  round((1 + w) * x / sqrt(mean(x²) + eps))
    add_rms_norm:    residual += update, then one of the above of residual

Means and quotients are in fp32. Shapes: T rows (any leading dimensions), E elements that are normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .arguments import require

NormKernel = Callable[[Tensor, Tensor, float], Tensor]
"""`(x, weight, eps) -> normalised x`."""


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`x_TE` normalised and scaled by `weight_E`; any strides.

    Raises:
        ConfigError: The weight is not a contiguous row of `x_TE` on its device.
    """
    _check_weight(x_TE, weight_E)
    if x_TE.is_cuda:
        from .norm_kernel import launch_rms_norm

        return launch_rms_norm(x_TE, weight_E, eps)
    return F.rms_norm(x_TE, weight_E.shape, None, eps).mul_(weight_E)


def gemma_rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`x_TE` normalised and scaled by `1 + weight_E`, rounded once; any strides.

    Raises:
        ConfigError: As `rms_norm`.
    """
    _check_weight(x_TE, weight_E)
    if x_TE.is_cuda:
        from .norm_kernel import launch_rms_norm

        return launch_rms_norm(x_TE, weight_E, eps, is_gemma=True)
    scaled_TE = F.rms_norm(x_TE.float(), weight_E.shape, None, eps).mul_(weight_E.float() + 1.0)
    return scaled_TE.to(x_TE.dtype)


def add_rms_norm(update_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float, norm: NormKernel) -> Tensor:
    """Add `update_TE` to `residual_TE` in place, and return the norm of the sum.

    Raises:
        ConfigError: As `rms_norm`; a residual that is not shaped and typed as the update, or whose rows do not lie at
            even distances with last stride 1.
    """
    _check_weight(update_TE, weight_E)
    _check_residual(update_TE, residual_TE)
    if residual_TE.is_cuda and norm in (rms_norm, gemma_rms_norm):
        from .norm_kernel import launch_add_rms_norm

        return launch_add_rms_norm(update_TE, residual_TE, weight_E, eps, is_gemma=norm is gemma_rms_norm)
    return norm(residual_TE.add_(update_TE), weight_E, eps)


def rms_norm_reference(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`rms_norm` by its definition."""
    x_fp32 = x_TE.float()
    normalised = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * normalised.to(x_TE.dtype)


def gemma_rms_norm_reference(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`gemma_rms_norm` by its definition."""
    x_fp32 = x_TE.float()
    normalised = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (normalised * (1.0 + weight_E.float())).to(x_TE.dtype)


def add_rms_norm_reference(
    update_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float, norm: NormKernel
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` without touching its arguments: the norm, and the sum."""
    sum_TE = residual_TE + update_TE
    return norm(sum_TE, weight_E, eps), sum_TE


def _check_weight(x_TE: Tensor, weight_E: Tensor) -> None:
    require("weight_E", weight_E, weight_E.dtype, tuple(x_TE.shape[-1:]), x_TE.device)


def _check_residual(update_TE: Tensor, residual_TE: Tensor) -> None:
    allowed = (update_TE.shape, update_TE.dtype, update_TE.device)
    if (residual_TE.shape, residual_TE.dtype, residual_TE.device) != allowed:
        raise ConfigError(
            f"residual is {residual_TE.dtype} {list(residual_TE.shape)} on {residual_TE.device}, but it must be as the "
            f"update, {update_TE.dtype} {list(update_TE.shape)} on {update_TE.device}",
            param="residual_TE",
        )
    if residual_TE.stride(-1) != 1 or not (residual_TE.dim() == 2 or residual_TE.is_contiguous()):
        raise ConfigError(
            f"residual has strides {residual_TE.stride()}, but it is updated in place: rows must lie at even "
            "distances with last stride 1",
            param="residual_TE",
        )
