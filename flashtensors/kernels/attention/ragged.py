"""The attention entry for GPUs: any mix of prefill, append and decode over a paged cache, from lengths on the device.

    work = AttentionWork(num_heads=32, num_kv_heads=8, head_dim=128, max_seqs=256, max_tokens=8192, device="cuda")
    work.plan(query_starts, kv_lengths)                                   # once a step
    out = ragged_attention(q, k_cache, v_cache, block_tables, work, scale=128**-0.5)    # in every layer

Shapes: T rows, S sequences, H query heads, K key-value heads, G = H / K, N pages, P page size, D head dim, B pages in
the longest block table. Sequence s owns rows `query_starts[s] … query_starts[s + 1] - 1`, which are the last of its
`kv_lengths[s]` tokens. Caches are `[N, K, P, D]` (HND).

Nothing waits for the device and nothing depends on lengths that only the host knows, so a CUDA graph captured with one
batch serves every batch of as many rows and sequences. Sequences of up to `SHORT_TOKENS` new tokens go to the split
kernel, which is bound by memory; longer ones go to the matrix units of Hopper where they are there, else to larger
tiles of the split kernel. A CPU without Triton's interpreter runs `ragged_attention_reference`.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..device_traits import has_fp8
from .call import RaggedCall, check_call
from .reference import ragged_attention_reference
from .tiles import SplitTiles
from .work import AttentionWork

if TYPE_CHECKING:
    from .work_queue import WorkQueue

_LOG2_E = 1.4426950408889634


def ragged_attention(
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
    """Attention of each row to its sequence's tokens in the cache; returns `[T, H, D]`.

    Args:
        q_THD: Queries after rope; heads and dims contiguous, any row stride.
        k_cache: `[N, K, P, D]`, contiguous; dtype of q, or float8_e4m3fn. Slots that no sequence uses may
            hold anything, NaN included. With a window, of the tokens before that of a sequence's first row, the last
            63 are read and count for nothing: their pages stay valid, and their slots finite.
        v_cache: As `k_cache`.
        block_tables: int32 [S, B]; row s lists the pages of sequence s.
        work: Planned for this batch.
        scale: Factor on scores.
        softcap: Bound on scores above 0, `cap * tanh(score / cap)`; None: unbounded.
        sinks_H: A logit for each head that takes part in the softmax and has no value.
        tree_mask_T: int64; bit j of row t says whether it sees the j-th new token of its sequence, which is itself or
            one before it: where the work is causal, bits of later ones count for nothing. All tokens before the new
            ones are seen. Needs `max_query_tokens` of at most 16 in `work.plan`.
        k_scales_K: float32 factors of an fp8 key cache; None, of both caches: 1.
        v_scales_K: float32 factors of an fp8 value cache.
        lse_TH: float32, filled with the natural-log sum of exponents.
        out_THD: Where to write, heads and dims contiguous; None: allocated. Rows of no sequence are left as they are.

    Raises:
        ConfigError: A shape, dtype, stride or device that does not fit; more rows than `work` holds; a work that has
            not been planned.
    """
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device) if out_THD is None else out_THD
    call = RaggedCall(q_THD, k_cache, v_cache, block_tables, out_THD, scale, softcap, sinks_H, tree_mask_T, k_scales_K,
                      v_scales_K, lse_TH)  # fmt: skip
    check_call(call, work)
    if q_THD.shape[0] == 0:
        return out_THD
    if not work.has_kernels:
        return ragged_attention_reference(work=work, **call._asdict())
    has_long_items = work.has_long or work.has_groups
    if has_long_items and work.is_hopper:
        _launch_hopper(work, call)
    elif has_long_items:
        _launch_split(work, work.long, work.long_tiles, 64, call._replace(tree_mask_T=None))
    if work.has_short and work.has_stream:
        _launch_stream(work, call)
    elif work.has_short:
        _launch_split(work, work.short, work.short_tiles, work.short_rows, call)
    return out_THD


def _launch_hopper(work: AttentionWork, call: RaggedCall) -> None:
    from .hopper import attend_hopper

    attend_hopper(
        call.q_THD, call.k_cache, call.v_cache, call.block_tables, call.out_THD, work.long, scale=call.scale,
        is_causal=work.is_causal, window=work.sliding_window, softcap=call.softcap, sinks=call.sinks_H,
        k_scales=call.k_scales_K, v_scales=call.v_scales_K, lse=call.lse_TH, num_programs=work.num_processors,
        must_merge=work.has_long,
    )  # fmt: skip


def _launch_stream(work: AttentionWork, call: RaggedCall) -> None:
    from .hopper_decode import attend_decodes

    assert work.stream is not None, "decodes are streamed without a queue for it"
    attend_decodes(
        call.q_THD, call.k_cache, call.v_cache, call.block_tables, call.out_THD, work.stream, work.stream_tiles,
        tile_rows=work.short_rows, scale=call.scale, is_causal=work.is_causal, window=work.sliding_window,
        softcap=call.softcap, sinks=call.sinks_H, tree=call.tree_mask_T, lse=call.lse_TH,
        reads_ahead=work.reads_ahead,
    )  # fmt: skip


def _launch_split(work: AttentionWork, queue: WorkQueue, tiles: SplitTiles, tile_rows: int, call: RaggedCall) -> None:
    from .groups import GROUP_INTS
    from .split import attend_split
    from .work_queue import RECORD_INTS

    (
        q_THD, k_cache, v_cache, block_tables, out_THD, scale, softcap, sinks_H, tree_mask_T, k_scales_K, v_scales_K,
        lse_TH,
    ) = call  # fmt: skip
    any_tensor = queue.partial_sums
    assert work.query_starts is not None, "plan() has not been called"
    table = work.group_table if work.has_groups and queue is work.short else None
    tile = work.long_tile
    if work.has_pairs_of_fp8:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    attend_split[(tiles.programs * work.num_processors,)](
        q_THD, k_cache, v_cache, out_THD, any_tensor if lse_TH is None else lse_TH, queue.items, queue.counts,
        queue.partial_out, queue.partial_sums, queue.arrivals, work.query_starts, block_tables,
        any_tensor if sinks_H is None else sinks_H, any_tensor if tree_mask_T is None else tree_mask_T,
        queue.items if table is None else table.owners, queue.items if table is None else table.records,
        work.long.partial_out, work.long.partial_sums, any_tensor if k_scales_K is None else k_scales_K,
        any_tensor if v_scales_K is None else v_scales_K,
        scale * _LOG2_E, (softcap or 1.0) * _LOG2_E, work.sliding_window or 0,
        q_THD.stride(0), q_THD.stride(1), *k_cache.stride()[:3], out_THD.stride(0),
        out_THD.stride(1), block_tables.stride(0),
        NUM_KV_HEADS=work.num_kv_heads, GROUP=work.num_heads // work.num_kv_heads, BLOCK_M=tiles.block_m,
        ROWS=tile_rows, BLOCK_N=tiles.block_n, PAGE=k_cache.shape[2], D=work.head_dim,
        D_PADDED=1 << (work.head_dim - 1).bit_length(),
        IS_CAUSAL=work.is_causal, HAS_WINDOW=work.sliding_window is not None, HAS_CAP=softcap is not None,
        HAS_SINKS=sinks_H is not None, HAS_TREE=tree_mask_T is not None, HAS_GROUPS=table is not None,
        HAS_SCALES=k_scales_K is not None, HAS_LSE=lse_TH is not None, MERGE=max(1, tiles.merged_rows // tile_rows),
        STAGES=tiles.num_stages,
        RECORD_INTS=RECORD_INTS, GROUP_INTS=GROUP_INTS, GROUP_TOKENS=tile.tokens, GROUP_ROWS=tile.rows,
        UNIT_HEADS=tile.unit_heads, HEAD_ROWS=tile.head_rows, TOKEN_ROWS=tile.token_rows,
        HAS_PAIRS=work.has_pairs_of_fp8, HAS_CONVERSION=has_fp8(work.device),
        HAS_EARLY_START=work.has_early_start, num_warps=tiles.num_warps, launch_pdl=work.has_early_start,
    )  # fmt: skip
