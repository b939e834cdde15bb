"""From the rows of a fused q|k|v projection to rotated queries and a filled cache, in one launch for each layer.

    q = rope(norm(q))                       norm: on each head, where the model has one (Qwen3, Gemma 3)
    cache[slot] = rope(norm(k)), v          quantised to fp8 where the cache is: round(x / scale), saturating

Only the first R elements of a head turn (partial rotary where R < D); their angles come from `rope.py`, so whatever
stretches frequencies (linear, llama3, yarn) is not seen here.

Shapes: T rows, H query heads, K key-value heads, D head dim, R rotary dim. Caches of one layer are
`[num_pages, K, page_size, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .arguments import check_cache
from .device_traits import has_fp8
from .fp8 import FP8_DTYPE, FP8_MAX
from .norm import gemma_rms_norm_reference, rms_norm_reference
from .rope import Rotation, apply_rope


@dataclass(frozen=True, kw_only=True)
class QkNorm:
    """RMSNorm on each head of q and k before rope."""

    q_weight_D: Tensor
    k_weight_D: Tensor
    eps: float
    is_gemma: bool = False
    """Scale by `1 + weight`, rounded once."""


@dataclass(frozen=True, kw_only=True)
class KvScales:
    """What a stored fp8 key or value is multiplied with to give the original, for each kv head."""

    k_scale_K: Tensor
    """fp32, on the device of the cache."""
    v_scale_K: Tensor


def rope_append(
    qkv: Tensor,
    rotation: Rotation,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    num_heads: int,
    positions_T: Tensor | None = None,
    norm: QkNorm | None = None,
    scales: KvScales | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotated queries `[T, H, D]`; keys and values go to their slots of the caches, in place.

    Args:
        qkv: `[T, (H + 2 K) * D]`, q first; last stride 1.
        rotation: Row t turns row t of `qkv`; with `positions_T` it is a table and row `positions_T[t]` does.
        k_cache: Last stride 1; dtype of `qkv`, or fp8 with `scales`.
        v_cache: As `k_cache`.
        slot_mapping_T: int64, page * page_size + offset; below 0: a padding row, of which nothing is written.
        num_heads: H.
        positions_T: int64 rows of `rotation`; None: as they come.
        norm: Norm on each head; None: there is none.
        scales: Needed for fp8 caches, and only for them. GPUs before Ada do not convert to fp8; for those, round with
            `quantise_kv` and store with `scatter_tokens` (`pages.py`).
        out: Where queries go, last stride 1; may be the part of `qkv` that they come from. None: a new tensor.

    Raises:
        ConfigError: An argument whose shape, dtype or stride does not fit, by name; an fp8 cache on a GPU before Ada.
    """
    _check(qkv, rotation, k_cache, v_cache, slot_mapping_T, num_heads, positions_T, norm, scales)
    shape = (qkv.shape[0], num_heads, k_cache.shape[3])
    if out is not None and (out.shape != shape or out.dtype != qkv.dtype or out.stride(-1) != 1):
        raise ConfigError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}, but it must be {qkv.dtype} "
            f"{list(shape)} with last stride 1"
        )
    if not qkv.is_cuda:
        q_THD = rope_append_reference(
            qkv,
            rotation,
            k_cache,
            v_cache,
            slot_mapping_T,
            num_heads=num_heads,
            positions_T=positions_T,
            norm=norm,
            scales=scales,
        )
        return q_THD if out is None else out.copy_(q_THD.where((slot_mapping_T >= 0)[:, None, None], out))
    _check_conversion(k_cache)
    from .rope_append_kernel import launch_rope_append

    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device) if out is None else out
    launch_rope_append(qkv, rotation, k_cache, v_cache, slot_mapping_T, out, positions_T, norm, scales)
    return out


def rope_append_reference(
    qkv: Tensor,
    rotation: Rotation,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    num_heads: int,
    positions_T: Tensor | None = None,
    norm: QkNorm | None = None,
    scales: KvScales | None = None,
) -> Tensor:
    """`rope_append` by its parts; queries of padding rows are computed too."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q_THD, k_TKD, v_TKD = qkv.unflatten(-1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norm is not None:
        apply_norm = gemma_rms_norm_reference if norm.is_gemma else rms_norm_reference
        q_THD = apply_norm(q_THD, norm.q_weight_D, norm.eps)
        k_TKD = apply_norm(k_TKD, norm.k_weight_D, norm.eps)
    if positions_T is not None:
        rotation = Rotation(cos_T1D=rotation.cos_T1D[positions_T], sin_T1D=rotation.sin_T1D[positions_T])
    q_THD, k_TKD = (apply_rope(x_THD, rotation).to(qkv.dtype) for x_THD in (q_THD, k_TKD))
    _write(k_TKD, k_cache, slot_mapping_T, None if scales is None else scales.k_scale_K)
    _write(v_TKD, v_cache, slot_mapping_T, None if scales is None else scales.v_scale_K)
    return q_THD


def quantise_kv(x_TKD: Tensor, scale_K: Tensor) -> Tensor:
    """`x_TKD / scale_K` as fp8, saturating at its largest number."""
    return (x_TKD.float() / scale_K[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def _write(x_TKD: Tensor, cache: Tensor, slot_mapping_T: Tensor, scale_K: Tensor | None) -> None:
    live_rows = (slot_mapping_T >= 0).nonzero().flatten()
    slots, page_size = slot_mapping_T[live_rows], cache.shape[2]
    new = x_TKD[live_rows]
    if scale_K is not None:  # torch indexes no fp8 on a CPU
        new, cache = quantise_kv(new, scale_K).view(torch.uint8), cache.view(torch.uint8)
    cache[slots // page_size, :, slots % page_size] = new


def _check(
    qkv: Tensor,
    rotation: Rotation,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping_T: Tensor,
    num_heads: int,
    positions_T: Tensor | None,
    norm: QkNorm | None,
    scales: KvScales | None,
) -> None:
    """Raise for the first argument that does not fit the others."""
    check_cache("k_cache", k_cache)
    num_rows, (_, num_kv_heads, _, head_dim) = qkv.shape[0], k_cache.shape
    width = (num_heads + 2 * num_kv_heads) * head_dim
    _require("qkv", qkv, qkv.dtype, (num_rows, width), qkv.device)
    cache_dtype = qkv.dtype if scales is None else FP8_DTYPE
    _require("k_cache", k_cache, cache_dtype, tuple(k_cache.shape), qkv.device)
    _require("v_cache", v_cache, cache_dtype, tuple(k_cache.shape), qkv.device)
    _require("slot_mapping_T", slot_mapping_T, torch.int64, (num_rows,), qkv.device)
    num_angles, rotary_dim = rotation.cos_T1D.shape[0], rotation.cos_T1D.shape[-1]
    if positions_T is not None:
        _require("positions_T", positions_T, torch.int64, (num_rows,), qkv.device)
    elif num_angles != num_rows:
        raise ConfigError(f"rotation has {num_angles} rows, but qkv has {num_rows}; give positions_T to look rows up")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ConfigError(f"rotation turns {rotary_dim} elements, but that must be even and at most {head_dim}")
    for name, angles in (("cos_T1D", rotation.cos_T1D), ("sin_T1D", rotation.sin_T1D)):
        _require(f"rotation.{name}", angles, angles.dtype, (num_angles, 1, rotary_dim), qkv.device)
    if norm is not None:
        _require("norm.q_weight_D", norm.q_weight_D, norm.q_weight_D.dtype, (head_dim,), qkv.device)
        _require("norm.k_weight_D", norm.k_weight_D, norm.k_weight_D.dtype, (head_dim,), qkv.device)
    if scales is not None:
        _require("scales.k_scale_K", scales.k_scale_K, torch.float32, (num_kv_heads,), qkv.device)
        _require("scales.v_scale_K", scales.v_scale_K, torch.float32, (num_kv_heads,), qkv.device)


def _check_conversion(k_cache: Tensor) -> None:
    """Raise for an fp8 cache on a GPU whose Triton does not know the type."""
    if k_cache.dtype == FP8_DTYPE and not has_fp8(k_cache.device):
        raise ConfigError(
            f"k_cache is {k_cache.dtype}, but this GPU does not convert to it (Ada, Hopper and later do); "
            "round with quantise_kv and store with scatter_tokens",
            param="k_cache",
        )


def _require(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype != dtype or x.shape != shape or x.device != device or (x.numel() and x.stride(-1) != 1):
        raise ConfigError(
            f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}, but it must be {dtype} "
            f"{list(shape)} with last stride 1 on {device}"
        )
