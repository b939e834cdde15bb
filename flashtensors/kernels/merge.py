"""Merge attention over disjoint parts of the keys, as if it had seen them all.

With `out_n` the attention over part n and `lse_n = log sum_j exp(score_j)` over its keys (natural logarithm):

    lse = log sum_n exp(lse_n),     out = sum_n exp(lse_n - lse) out_n

A part without keys has `lse_n = -inf`; its `out_n` may be anything, NaN included. Without any keys: zeros and -inf.
Sums are in fp32. (Online softmax: Milakov and Gimelshein, 2018; as in FlashAttention and Hydragen.)

Shapes: N parts, T rows, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError


def merge_pair(
    out_a_THD: Tensor, lse_a_TH: Tensor, out_b_THD: Tensor, lse_b_TH: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge two parts to `(out [T, H, D], lse [T, H] fp32)`; `out` may be either part."""
    shape, device = out_a_THD.shape, out_a_THD.device
    _check("out_b_THD", out_b_THD, shape, out_a_THD.dtype, device)
    _check("lse_a_TH", lse_a_TH, shape[:-1], torch.float32, device)
    _check("lse_b_TH", lse_b_TH, shape[:-1], torch.float32, device)
    out = _checked_out(out_a_THD, shape, out)
    if out_a_THD.is_cuda:
        from .merge_kernel import launch_merge_pair

        return out, launch_merge_pair(out_a_THD, lse_a_TH, out_b_THD, lse_b_TH, out)
    merged_THD, lse_TH = merge_pair_reference(out_a_THD, lse_a_TH, out_b_THD, lse_b_TH)
    return out.copy_(merged_THD), lse_TH


def merge_parts(out_NTHD: Tensor, lse_NTH: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge N parts to `(out [T, H, D], lse [T, H] fp32)`; `out` may have another dtype than the parts."""
    _check("lse_NTH", lse_NTH, out_NTHD.shape[:-1], torch.float32, out_NTHD.device)
    out = _checked_out(out_NTHD, out_NTHD.shape[1:], out)
    if out_NTHD.is_cuda:
        from .merge_kernel import launch_merge_parts

        return out, launch_merge_parts(out_NTHD, lse_NTH, out)
    merged_THD, lse_TH = merge_parts_reference(out_NTHD, lse_NTH)
    return out.copy_(merged_THD), lse_TH


def merge_pair_reference(
    out_a_THD: Tensor, lse_a_TH: Tensor, out_b_THD: Tensor, lse_b_TH: Tensor
) -> tuple[Tensor, Tensor]:
    """`merge_pair` by its definition."""
    return merge_parts_reference(torch.stack((out_a_THD, out_b_THD)), torch.stack((lse_a_TH, lse_b_TH)))


def merge_parts_reference(out_NTHD: Tensor, lse_NTH: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_parts` by its definition."""
    lse_TH = torch.logsumexp(lse_NTH.float(), dim=0)
    is_empty_NTH = lse_NTH == -torch.inf
    weight_NTH = torch.exp(lse_NTH.float() - lse_TH).masked_fill(is_empty_NTH, 0.0)
    parts_NTHD = out_NTHD.float().masked_fill(is_empty_NTH[..., None], 0.0)
    return (weight_NTH[..., None] * parts_NTHD).sum(0).to(out_NTHD.dtype), lse_TH


def _check(name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        got = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ConfigError(f"{name} is {got}, but it must be {dtype} {list(shape)} on {device}", param=name)


def _checked_out(parts: Tensor, shape: torch.Size, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=parts.dtype, device=parts.device)
    if out.shape != shape or not out.is_contiguous() or not out.is_floating_point() or out.device != parts.device:
        raise ConfigError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()} on {out.device}, but it must be "
            f"contiguous floats {list(shape)} on {parts.device}",
            param="out",
        )
    return out
