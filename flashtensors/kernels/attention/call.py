"""What `ragged_attention` is called with, and what of it must fit.

Shapes: as in `ragged.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ..arguments import require_that
from ..fp8 import FP8_DTYPE
from .limits import SHORT_TOKENS
from .work import AttentionWork

_PAGE_SIZES = (16, 32, 64, 128)
_SINK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RaggedCall(NamedTuple):
    """Arguments of `ragged_attention`, aside from its work."""

    q_THD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    out_THD: Tensor
    scale: float
    softcap: float | None
    sinks_H: Tensor | None
    tree_mask_T: Tensor | None
    k_scales_K: Tensor | None
    v_scales_K: Tensor | None
    lse_TH: Tensor | None


def check_call(call: RaggedCall, work: AttentionWork) -> None:
    """Refuse a call that does not fit `work` and the batch that it is planned for.

    The layout that was checked last is remembered: in the layers of a step the checks would take as long as a launch.

    Raises:
        ConfigError: An argument by its name, what it is and what it must be.
    """
    check_softcap(call.softcap)
    starts = work.query_starts
    if starts is None:
        raise ConfigError("work holds no batch: call work.plan(query_starts, kv_lengths) first", param="work")
    tensors = (
        call.q_THD, call.k_cache, call.v_cache, call.block_tables, call.out_THD, call.sinks_H, call.tree_mask_T,
        call.k_scales_K, call.v_scales_K, call.lse_TH,
    )  # fmt: skip
    layouts = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
    layout = (starts.shape, starts.device, work.has_long, layouts)
    if layout == work.checked_layout:
        return
    _check_rows(call, work, starts.shape[0] - 1)
    _check_caches(call, work)
    _check_extras(call, work)
    for name, x in call._asdict().items():
        if isinstance(x, Tensor):
            require_that(x.device == starts.device, name, f"on {x.device}", f"on {starts.device}, as query_starts")
    work.checked_layout = layout


def check_softcap(softcap: float | None) -> None:
    """Refuse a bound on scores that bounds nothing."""
    is_bound = softcap is None or 0 < softcap < math.inf
    require_that(is_bound, "softcap", softcap, "above 0 and finite, or None for unbounded scores")


def _check_rows(call: RaggedCall, work: AttentionWork, num_seqs: int) -> None:
    q_THD, out_THD, tables = call.q_THD, call.out_THD, call.block_tables
    heads = (work.num_heads, work.head_dim)
    require_that(q_THD.dim() == 3 and q_THD.shape[1:] == heads, "q_THD", q_THD.shape, f"[T, {heads[0]}, {heads[1]}]")
    strides = (work.head_dim, 1)
    require_that(q_THD.stride()[1:] == strides, "q_THD", q_THD.stride(), "strides with heads and dims contiguous")
    require_that(q_THD.dtype == work.dtype, "q_THD", q_THD.dtype, f"{work.dtype}, which the work was made for")
    most = f"at most {work.max_tokens} rows, max_tokens of the work; make it with more, or split the batch"
    require_that(q_THD.shape[0] <= work.max_tokens, "q_THD", f"{q_THD.shape[0]} rows", most)
    require_that(out_THD.shape == q_THD.shape, "out_THD", out_THD.shape, f"{list(q_THD.shape)}, as q_THD")
    require_that(out_THD.stride()[1:] == strides, "out_THD", out_THD.stride(), "heads and dims contiguous")
    require_that(out_THD.dtype == q_THD.dtype, "out_THD", out_THD.dtype, f"{q_THD.dtype}, as q_THD")
    require_that(tables.dtype == torch.int32, "block_tables", tables.dtype, "torch.int32")
    is_shape = tables.dim() == 2 and tables.shape[0] >= num_seqs
    require_that(is_shape, "block_tables", tables.shape, f"[{num_seqs}, B], a row for each sequence of the plan")
    is_row = tables.shape[1] <= 1 or tables.stride(1) == 1
    require_that(is_row, "block_tables", tables.stride(), "strides with rows contiguous")


def _check_caches(call: RaggedCall, work: AttentionWork) -> None:
    k_cache, v_cache = call.k_cache, call.v_cache
    require_that(v_cache.shape == k_cache.shape, "v_cache", v_cache.shape, f"{list(k_cache.shape)}, as k_cache")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        is_shape = cache.dim() == 4 and cache.shape[1] == work.num_kv_heads and cache.shape[3] == work.head_dim
        require_that(is_shape, name, cache.shape, f"[N, {work.num_kv_heads}, P, {work.head_dim}]")
        require_that(cache.is_contiguous(), name, cache.stride(), "contiguous")
        require_that(cache.dtype == work.kv_dtype, name, cache.dtype, f"{work.kv_dtype}, which the work was made for")
        require_that(cache.shape[2] in _PAGE_SIZES, name, cache.shape[2], "a page size of 16, 32, 64 or 128")
    if (call.k_scales_K is None) != (call.v_scales_K is None):
        name, other = ("k_scales_K", "v_scales_K")[:: 1 if call.k_scales_K is None else -1]
        raise ConfigError(f"{other} is given without {name}; give both, or neither for factors of 1", param=name)
    if call.k_scales_K is not None and work.kv_dtype != FP8_DTYPE:
        raise ConfigError(
            f"k_scales_K and v_scales_K are factors of {FP8_DTYPE} caches, but the caches are {work.kv_dtype}; "
            "leave them out",
            param="k_scales_K",
        )


def _check_extras(call: RaggedCall, work: AttentionWork) -> None:
    num_rows, num_heads, _ = call.q_THD.shape
    _check_vector("sinks_H", call.sinks_H, (num_heads,), _SINK_DTYPES)
    _check_vector("tree_mask_T", call.tree_mask_T, (num_rows,), (torch.int64,))
    _check_vector("k_scales_K", call.k_scales_K, (work.num_kv_heads,), (torch.float32,))
    _check_vector("v_scales_K", call.v_scales_K, (work.num_kv_heads,), (torch.float32,))
    _check_vector("lse_TH", call.lse_TH, (num_rows, num_heads), (torch.float32,))
    if call.tree_mask_T is not None and work.has_long:
        raise ConfigError(
            f"tree_mask_T is for sequences of at most {SHORT_TOKENS} new tokens, but the plan may hold longer ones; "
            f"call work.plan(..., max_query_tokens=n) with n of at most {SHORT_TOKENS}",
            param="tree_mask_T",
        )


def _check_vector(name: str, x: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if x is not None:
        require_that(x.shape == shape, name, x.shape, f"{list(shape)}")
        require_that(x.dtype in dtypes, name, x.dtype, " or ".join(map(str, dtypes)))
        require_that(x.is_contiguous(), name, x.stride(), "contiguous")
