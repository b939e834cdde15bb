"""Causal attention of a ragged batch over keys and values in pages.

For query `i` at position `p` of its sequence and keys `j`:

    score_ij = softcap * tanh(q_i · k_j * scale / softcap)      (without softcap: q_i · k_j * scale)
    out_i    = sum_j softmax_j(score_ij) v_j,                   j in (p - sliding_window, p]

Shapes: T rows, S decoding sequences, N new tokens of one sequence, H query heads, K key-value heads, G = H / K query
heads that share a key-value head, L keys, D head dim. Caches of one layer are `[num_blocks, K, block_size, D]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import AttentionBatch
from .call import check_softcap
from .plan import DecodePlan, PrefillPlan, plan_append, plan_attention


def append_kv(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """Write the new keys and values of `batch` to their slots in the caches, in place.

    Args:
        k_TKD: New keys after rope; any strides.
        v_TKD: New values; any strides.
        k_cache: Contiguous, dtype of `k_TKD`.
        v_cache: As `k_cache`.
        batch: Its `slot_mapping` says where each row goes.
    """
    assert k_cache.is_contiguous(), "k_cache must be contiguous"
    assert v_cache.is_contiguous(), "v_cache must be contiguous"
    head_dim = k_cache.shape[-1]
    rows = plan_append(batch, k_cache)
    k_cache.view(-1, head_dim).index_copy_(0, rows, k_TKD.reshape(-1, head_dim))
    v_cache.view(-1, head_dim).index_copy_(0, rows, v_TKD.reshape(-1, head_dim))


def paged_attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of each row to the tokens up to its own, which `append_kv` has written; returns `[T, H, D]`.

    Args:
        q_THD: Queries after rope; any strides.
        k_cache: Contiguous, dtype of `q_THD`; slots that no sequence of `batch` uses may hold anything.
        v_cache: As `k_cache`.
        batch: Rows of each sequence and where its tokens lie.
        scale: Factor on scores.
        sliding_window: Tokens that a row sees, itself included; None: all.
        softcap: Bound on scores, above 0; None: unbounded.

    Raises:
        ConfigError: `softcap` is no bound.
    """
    check_softcap(softcap)
    plan = plan_attention(batch, k_cache, sliding_window=sliding_window, dtype=q_THD.dtype)
    if len(plan.decodes) == 1 and plan.decodes[0].query_rows_S is None:
        return _decode(q_THD, k_cache, v_cache, plan.decodes[0], scale, softcap)
    out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
    for prefill in plan.prefills:
        rows = slice(prefill.query_start, prefill.query_start + prefill.num_tokens)
        out_THD[rows] = _prefill(q_THD[rows], k_cache, v_cache, prefill, scale, softcap)
    for decode in plan.decodes:
        rows_S = decode.query_rows_S
        assert rows_S is not None, "only decodes that are the whole batch need no rows"
        out_SHD = _decode(q_THD.index_select(0, rows_S), k_cache, v_cache, decode, scale, softcap)
        out_THD.index_copy_(0, rows_S, out_SHD)
    return out_THD


def _decode(
    q_SHD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: DecodePlan, scale: float, softcap: float | None
) -> Tensor:
    """One query for each sequence; the G heads of a group are the rows of one product, so keys are read once."""
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    kv_shape = (q_SHD.shape[0], num_kv_heads, plan.kv_length, head_dim)
    k_SKLD = k_cache.view(-1, head_dim).index_select(0, plan.cache_rows).view(kv_shape)
    v_SKLD = v_cache.view(-1, head_dim).index_select(0, plan.cache_rows).view(kv_shape)
    q_SKGD = q_SHD.unflatten(1, (num_kv_heads, -1))
    if softcap is None and not _is_explicit_quicker(q_SHD):
        out_SKGD = F.scaled_dot_product_attention(q_SKGD, k_SKLD, v_SKLD, attn_mask=plan.mask_S11L, scale=scale)
    else:
        out_SKGD = _explicit_attention(q_SKGD, k_SKLD, v_SKLD, plan.mask_S11L, scale, softcap)
    return out_SKGD.reshape(q_SHD.shape)


def _prefill(
    q_NHD: Tensor, k_cache: Tensor, v_cache: Tensor, plan: PrefillPlan, scale: float, softcap: float | None
) -> Tensor:
    """All new tokens of one sequence: a batch of G, whose members share (not copy) the keys of K heads.

    Not a batch of K with G heads: where keys have stride 0 over heads, torch's memory-efficient kernel computes wrong
    rows if the number of queries is one more than a multiple of its tile (pytorch/pytorch#191937).
    """
    num_kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q_GKND = q_NHD.unflatten(1, (num_kv_heads, -1)).permute(2, 1, 0, 3)
    kv_shape = (1, num_kv_heads, plan.kv_length, head_dim)
    group = (q_GKND.shape[0], -1, -1, -1)
    k_GKLD = k_cache.view(-1, head_dim).index_select(0, plan.cache_rows).view(kv_shape).expand(group)
    v_GKLD = v_cache.view(-1, head_dim).index_select(0, plan.cache_rows).view(kv_shape).expand(group)
    mask_NL = plan.mask_NL
    if softcap is None:
        mask = None if mask_NL is None else mask_NL[None, None]
        out_GKND = F.scaled_dot_product_attention(
            q_GKND, k_GKLD, v_GKLD, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    else:
        if mask_NL is None:
            mask_NL = torch.full_like(q_GKND[0, 0, :, :1], float("-inf")).repeat(1, plan.kv_length).triu_(1)
        out_GKND = _explicit_attention(q_GKND, k_GKLD, v_GKLD, mask_NL, scale, softcap)
    return out_GKND.permute(2, 1, 0, 3).reshape(q_NHD.shape)


def _is_explicit_quicker(q_SHD: Tensor) -> bool:
    """Several fp32 decodes on a CPU: 88 against 124 µs for 8 x 160 tokens. In bf16 the scores would be rounded."""
    return q_SHD.shape[0] > 1 and q_SHD.dtype == torch.float32 and q_SHD.device.type == "cpu"


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """With all scores in memory, in fp32."""
    scores = torch.matmul(q * scale, k.transpose(-1, -2)).float()
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
    if mask is not None:
        scores += mask
    return torch.matmul(torch.softmax(scores, dim=-1).to(v.dtype), v)


def paged_attention_reference(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`paged_attention` by its definition: one row, one head, one token at a time gathered, in the dtype given."""
    num_heads, block_size = q_THD.shape[1], k_cache.shape[2]
    group_size = num_heads // k_cache.shape[1]
    out_THD = torch.empty_like(q_THD)
    for table_B, (query_start, num_tokens, kv_length) in zip(batch.block_tables.tolist(), batch.spans, strict=True):
        for index in range(num_tokens):
            last = kv_length - num_tokens + index
            first = 0 if sliding_window is None else max(0, last + 1 - sliding_window)
            slots = [(table_B[p // block_size], p % block_size) for p in range(first, last + 1)]
            for head in range(num_heads):
                k_LD = torch.stack([k_cache[block, head // group_size, offset] for block, offset in slots])
                v_LD = torch.stack([v_cache[block, head // group_size, offset] for block, offset in slots])
                scores_L = k_LD @ q_THD[query_start + index, head] * scale
                if softcap is not None:
                    scores_L = softcap * torch.tanh(scores_L / softcap)
                out_THD[query_start + index, head] = torch.softmax(scores_L, dim=0) @ v_LD
    return out_THD
