"""Calls that launch every kernel a decoder's layers need, on inputs as small as they get, for `binaries.warm`.

A specialisation depends on head counts, dims, dtypes and features, not on lengths, rows or pages: these calls compile
what any batch of the model will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention.ragged import ragged_attention
from .attention.tiles import short_tiles
from .attention.work import SHORT_TOKENS, AttentionWork
from .norm_kernel import launch_add_rms_norm, launch_rms_norm

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """What of a model its kernels are compiled for."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_seqs: int
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    is_gemma: bool = False
    """Norms scale by `1 + weight`."""


def decoder_calls(shape: DecoderShape, device: torch.device) -> list[Call]:
    """Norms and attention of `shape`: decode at each number of sequences that has tiles of its own, with groups and
    without, and prefill. They share no memory, so that they can run side by side."""
    return [*_norm_calls(shape, device), *_attention_calls(shape, device)]


def _norm_calls(shape: DecoderShape, device: torch.device) -> Iterator[Call]:
    def rows() -> Tensor:
        return torch.zeros(2, shape.hidden_size, dtype=shape.dtype, device=device)

    def norm() -> None:
        launch_rms_norm(rows(), rows()[0], 1e-6, is_gemma=shape.is_gemma)

    def add_norm() -> None:
        launch_add_rms_norm(rows(), rows(), rows()[0], 1e-6, is_gemma=shape.is_gemma)

    yield norm
    yield add_norm


def _attention_calls(shape: DecoderShape, device: torch.device) -> Iterator[Call]:
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    by_tiles = {
        short_tiles(num_seqs, shape.num_kv_heads, shape.head_dim, processors): num_seqs
        for num_seqs in range(shape.max_seqs, 0, -1)
    }
    for num_seqs in by_tiles.values():
        for new_tokens in (1, SHORT_TOKENS):
            if num_seqs * new_tokens <= shape.max_tokens:
                yield lambda s=num_seqs, n=new_tokens: _attend(shape, device, s, n, has_groups=False)
                if shape.sliding_window is None:
                    yield lambda s=num_seqs, n=new_tokens: _attend(shape, device, s, n, has_groups=True)
    if shape.max_tokens > SHORT_TOKENS:
        yield lambda: _attend(shape, device, 1, SHORT_TOKENS + 1, has_groups=False)


def _attend(shape: DecoderShape, device: torch.device, num_seqs: int, new_tokens: int, *, has_groups: bool) -> None:
    work = AttentionWork(
        num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, max_seqs=shape.max_seqs,
        max_tokens=shape.max_tokens, device=device, dtype=shape.dtype, kv_dtype=shape.kv_dtype,
        sliding_window=shape.sliding_window,
    )  # fmt: skip
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * new_tokens
    lengths = torch.full((num_seqs,), new_tokens, dtype=torch.int32, device=device)
    groups = torch.zeros(1, 3, dtype=torch.int32, device=device) if has_groups else None
    work.plan(starts, lengths, groups=groups, max_query_tokens=new_tokens, min_query_tokens=new_tokens)
    q_THD = torch.zeros(num_seqs * new_tokens, shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
    num_pages = -(-new_tokens // shape.page_size)
    cache = torch.zeros(
        num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim, dtype=work.kv_dtype, device=device
    )
    tables = torch.arange(num_pages, dtype=torch.int32, device=device).repeat(num_seqs, 1)
    is_fp8 = work.kv_dtype != shape.dtype
    scales = torch.ones(shape.num_kv_heads, device=device) if is_fp8 else None
    sinks = torch.zeros(shape.num_heads, dtype=shape.dtype, device=device) if shape.has_sinks else None
    ragged_attention(
        q_THD, cache, cache, tables, work, scale=1.0, softcap=shape.softcap, sinks_H=sinks, k_scales_K=scales,
        v_scales_K=scales,
    )  # fmt: skip
