"""Launching the streaming decode kernel of Hopper.

Shapes: T rows, H query heads, D head dim.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_decode_kernel import attend_stream
from .stream_queue import GRAIN, TILE_INTS, StreamQueue
from .tiles import StreamTiles

TAIL = 16
"""Keys of a box at the end of a sequence."""


def attend_decodes(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    out_THD: Tensor,
    queue: StreamQueue,
    tiles: StreamTiles,
    *,
    tile_rows: int,
    scale: float,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    tree: Tensor | None,
    lse: Tensor | None,
    reads_ahead: bool,
) -> None:
    """Compute the tiles of `queue`; arguments as for `ragged_attention` and `AttentionWork`, checked there."""
    _, num_heads, head_dim = q_THD.shape
    _, num_kv_heads, page, _ = k_cache.shape
    descriptors = [
        TensorDescriptor.from_tensor(cache.view(-1, head_dim), [box, head_dim], _layout(box, head_dim, q_THD.dtype))
        for box in (min(page, tiles.block_n, GRAIN), TAIL)
        for cache in (k_cache, v_cache)
    ]
    log2_e = 1.4426950408889634
    any_tensor = queue.partial_sums
    attend_stream[(queue.num_programs,)](
        q_THD, *descriptors, out_THD, any_tensor if lse is None else lse, any_tensor if sinks is None else sinks,
        any_tensor if tree is None else tree, queue.tiles, queue.starts, queue.share, queue.partial_out,
        queue.partial_sums, queue.arrivals, block_tables, scale * log2_e, (softcap or 1.0) * log2_e, window or 0,
        q_THD.stride(0), q_THD.stride(1), out_THD.stride(0), out_THD.stride(1), block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads, GROUP=num_heads // num_kv_heads, ROWS=tile_rows, PAGE=page, BLOCK_N=tiles.block_n,
        D=head_dim, SLOTS=tiles.slots, GRAIN=GRAIN, TILE_INTS=TILE_INTS, TAIL=TAIL,
        IS_CAUSAL=is_causal, HAS_WINDOW=window is not None, HAS_CAP=softcap is not None, HAS_TREE=tree is not None,
        HAS_SINKS=sinks is not None, HAS_LSE=lse is not None, READS_AHEAD=reads_ahead, num_warps=4,
        maxnreg=tiles.registers, launch_pdl=True,
    )  # fmt: skip


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
