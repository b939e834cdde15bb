"""`ragged_attention` by its definition, in plain torch: what runs on a CPU.

For row i of the n new tokens of a sequence of L tokens, at position p = L - n + i, and its sequence's keys j:

    score_j = softcap * tanh(q · k_j * scale / softcap)         without softcap: q · k_j * scale
    lse     = log(exp(sink) + sum_j exp(score_j))               without sinks: of the sum alone
    out     = sum_j exp(score_j - lse) v_j                      over the keys that the row sees

    causal    j <= p
    window    j > p - window, besides the other two
    tree      j < L - n, or bit j - (L - n) of the row's mask is set; besides causal, where the work is

A row that sees no key gets zeros. Keys and values of an fp8 cache are multiplied with the factor of their head.
(Attention: Vaswani et al., 2017; windows: Beltagy et al., 2020; soft caps: Gemma 2, 2024; sinks: gpt-oss, 2025.)

Shapes: T rows, N of them at a time, S sequences, H query heads, K key-value heads, G = H / K, L keys, D head dim,
B pages in the longest block table. Caches are `[num_pages, K, page_size, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConfigError
from ..fp8 import FP8_DTYPE
from .call import check_softcap
from .work import AttentionWork

_TILE_ROWS = 64
"""Rows whose scores are in memory at a time."""


def ragged_attention_reference(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    work: AttentionWork,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    tree_mask_T: Tensor | None = None,
    k_scales_K: Tensor | None = None,
    v_scales_K: Tensor | None = None,
    lse_TH: Tensor | None = None,
    out_THD: Tensor | None = None,
) -> Tensor:
    """`ragged_attention` one sequence after another, with its arguments; returns `[T, H, D]` in the dtype of q.

    Sums are in fp32. Of `work` only lengths, window and causality count: groups, hints and splits change no result.
    On a GPU it waits for the device.

    Raises:
        ConfigError: `work` has not been planned, or `softcap` is no bound.
    """
    check_softcap(softcap)
    if work.query_starts is None or work.kv_lengths is None:
        raise ConfigError("work holds no batch: call work.plan(query_starts, kv_lengths) first", param="work")
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device) if out_THD is None else out_THD
    starts = work.query_starts.tolist()
    for s, length in enumerate(work.kv_lengths.tolist()):
        begin, end = starts[s], starts[s + 1]
        if begin == end:
            continue
        first_new = length - (end - begin)
        first_key = 0 if work.sliding_window is None else max(0, first_new + 1 - work.sliding_window)
        keys_L = torch.arange(first_key, length, device=q_THD.device)
        k_LKD = _read(k_cache, block_tables[s], keys_L, k_scales_K)
        v_LKD = _read(v_cache, block_tables[s], keys_L, v_scales_K)
        for row in range(begin, end, _TILE_ROWS):
            rows = slice(row, min(row + _TILE_ROWS, end))
            own_N = torch.arange(rows.start, rows.stop, device=q_THD.device) - begin + first_new
            is_seen_NL = _visible(keys_L, own_N, first_new, work, None if tree_mask_T is None else tree_mask_T[rows])
            out_THD[rows], lse_NH = _attend(q_THD[rows], k_LKD, v_LKD, is_seen_NL, scale, softcap, sinks_H)
            if lse_TH is not None:
                lse_TH[rows] = lse_NH
    return out_THD


def _read(cache: Tensor, pages_B: Tensor, keys_L: Tensor, scales_K: Tensor | None) -> Tensor:
    """float32 [L, K, D]: the tokens `keys_L` of one sequence, and no other slot."""
    is_fp8 = cache.dtype == FP8_DTYPE
    numbers = cache.view(torch.uint8) if is_fp8 else cache  # torch indexes no fp8 on a CPU
    page_size = cache.shape[2]
    x_LKD = numbers[pages_B[keys_L // page_size].long(), :, keys_L % page_size]
    x_LKD = (x_LKD.view(FP8_DTYPE) if is_fp8 else x_LKD).float()
    return x_LKD if scales_K is None else x_LKD * scales_K[:, None]


def _visible(keys_L: Tensor, own_N: Tensor, first_new: int, work: AttentionWork, tree_N: Tensor | None) -> Tensor:
    """bool [N, L]: whether the row at position `own_N` sees the key at `keys_L`; new tokens begin at `first_new`."""
    own_N1 = own_N[:, None]
    is_seen_NL = (keys_L >= 0).expand(len(own_N), -1)
    if tree_N is not None:
        drafted_L = keys_L - first_new
        bit_NL = (tree_N[:, None] >> drafted_L.clamp(min=0)) & 1
        is_seen_NL = (drafted_L < 0) | (bit_NL == 1)
    if work.is_causal:
        is_seen_NL = is_seen_NL & (keys_L <= own_N1)
    return is_seen_NL if work.sliding_window is None else is_seen_NL & (keys_L > own_N1 - work.sliding_window)


def _attend(
    q_NHD: Tensor,
    k_LKD: Tensor,
    v_LKD: Tensor,
    is_seen_NL: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [N, H, D] in the dtype of q and float32 lse [N, H] of some rows of one sequence."""
    q_NKGD = q_NHD.float().unflatten(1, (k_LKD.shape[1], -1))
    scores_NHL = torch.einsum("nkgd,lkd->nkgl", q_NKGD, k_LKD).flatten(1, 2) * scale
    if softcap is not None:
        scores_NHL = softcap * torch.tanh(scores_NHL / softcap)
    scores_NHL.masked_fill_(~is_seen_NL[:, None], -torch.inf)
    lse_NH = scores_NHL.logsumexp(-1)
    if sinks_H is not None:
        lse_NH = torch.logaddexp(lse_NH, sinks_H.float())
    shares_NHL = torch.exp(scores_NHL - lse_NH.masked_fill(lse_NH == -torch.inf, 0.0)[..., None])
    shares_NKGL = shares_NHL.unflatten(1, (k_LKD.shape[1], -1))
    return torch.einsum("nkgl,lkd->nkgd", shares_NKGL, v_LKD).flatten(1, 2).to(q_NHD.dtype), lse_NH
