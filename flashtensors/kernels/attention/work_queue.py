"""Work items for attention, made on the device from lengths that only the device knows.

A work item is a tile of query tokens of one sequence against a chunk of its keys, for all heads (heads are unrolled by
the kernels that read the queue). Where there are fewer tiles than multiprocessors the keys are split, so that decode
of one sequence and a short append on a long one fill the device as well as a large prefill does. Nothing here depends
on a length that the host knows: a captured CUDA graph stays right for any lengths.

Cost is tiles x visible keys; the chunk is about the number of keys for which the items of all heads number the target,
and the splits of one sequence are even. `fixed_chunk` overrides it: then the split of a sequence, and so the order of
every sum, depends on that sequence alone, and results are bitwise the same whatever else is in the batch.

Longest tiles come first within a sequence: a persistent grid that takes items in order ends with the short ones.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ConfigError

RECORD_INTS = 8
"""int32 of one item: first row, its position, rows, key begin, key end, split, number of splits, sequence.
An unused record has no rows."""

GRAIN = 64
"""Keys by which chunks grow; a multiple of every key tile that splits."""


@triton.jit
def _make_items(
    query_starts,
    kv_lengths,
    kv_starts,
    items,
    num_items,
    num_seqs,
    target_items,
    fixed_chunk,
    window,
    max_items,
    TILE_TOKENS: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GRAIN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    MAX_SEQS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each sequence: all scan all lengths (they fit in one block), each writes its own items."""
    sequence = tl.program_id(0)
    s = tl.arange(0, MAX_SEQS)
    is_live = s < num_seqs
    row = tl.load(query_starts + s, mask=is_live, other=0)
    num_tokens = tl.load(query_starts + s + 1, mask=is_live, other=0) - row
    kv_length = tl.load(kv_lengths + s, mask=is_live, other=0)
    start = tl.zeros([MAX_SEQS], tl.int32)
    if HAS_STARTS:
        start = tl.load(kv_starts + s, mask=is_live, other=0)
    is_mine = (num_tokens >= MIN_TOKENS) & (num_tokens <= MAX_TOKENS)
    num_tiles = tl.where(is_mine, tl.cdiv(num_tokens, TILE_TOKENS), 0)
    seen = tl.maximum(tl.minimum(kv_length - start, window + TILE_TOKENS + GRAIN), 0)
    cost = tl.sum((num_tiles * tl.cdiv(seen, GRAIN)).to(tl.int64), 0) * NUM_HEADS
    chunk = tl.maximum(tl.cdiv(cost, target_items), 1).to(tl.int32) * GRAIN
    chunk = tl.where(fixed_chunk > 0, fixed_chunk, chunk)
    # a remainder under a quarter of a chunk is not worth an item: it would open a second round for nothing
    num_splits = tl.maximum((seen + chunk - 1 - tl.where(fixed_chunk > 0, 0, chunk // 4)) // chunk, 1)
    count = num_tiles * num_splits
    end = tl.cumsum(count, 0)
    if sequence == 0:
        tl.store(num_items, tl.minimum(tl.sum(count, 0), max_items))

    is_this = s == sequence
    tiles = tl.sum(tl.where(is_this, num_tiles, 0), 0)
    splits = tl.sum(tl.where(is_this, num_splits, 0), 0)
    first_item = tl.sum(tl.where(is_this, end - count, 0), 0)
    first_row = tl.sum(tl.where(is_this, row, 0), 0)
    tokens = tl.sum(tl.where(is_this, num_tokens, 0), 0)
    length = tl.sum(tl.where(is_this, kv_length, 0), 0)
    first_key = tl.sum(tl.where(is_this, start, 0), 0)
    even = tl.cdiv(tl.cdiv(tl.sum(tl.where(is_this, seen, 0), 0), splits), GRAIN) * GRAIN
    chunk = tl.where(fixed_chunk > 0, fixed_chunk, tl.maximum(even, GRAIN))
    for block in range(0, tiles * splits, BLOCK):
        i = block + tl.arange(0, BLOCK)
        split = i % splits
        token = (tiles - 1 - i // splits) * TILE_TOKENS
        rows = tl.minimum(TILE_TOKENS, tokens - token)
        position = length - tokens + token
        last = tl.where(IS_CAUSAL, position + rows, length)
        begin = tl.maximum(position - window + 1, first_key) // GRAIN * GRAIN
        begin = tl.maximum(begin, first_key)
        used = tl.maximum(tl.cdiv(last - begin, chunk), 1)
        key = begin + split * chunk
        at = items + (first_item + i) * 8
        is_item = (i < tiles * splits) & (first_item + i < max_items)
        tl.store(at, first_row + token, mask=is_item)
        tl.store(at + 1, position, mask=is_item)
        tl.store(at + 2, tl.where(split < used, rows, 0), mask=is_item)
        tl.store(at + 3, key, mask=is_item)
        tl.store(at + 4, tl.minimum(key + chunk, last), mask=is_item)
        tl.store(at + 5, split, mask=is_item)
        tl.store(at + 6, used, mask=is_item)
        tl.store(at + 7, sequence + i * 0, mask=is_item)


class WorkQueue:
    """Items of one kind of tile, with room for what splits of a tile must hand over.

    Args:
        max_items: Items it can hold; `max_items_for` says how many a batch can need.
        num_heads: Heads over which a kernel unrolls every item.
        tile_rows: Rows of a tile for one such head.
        head_dim: Elements in a row.
        device: Where it lives.
    """

    def __init__(
        self, *, max_items: int, num_heads: int, tile_rows: int, head_dim: int, device: torch.device | str
    ) -> None:
        self.max_items = max_items
        self.num_heads = num_heads
        self.items = torch.zeros(max_items, RECORD_INTS, dtype=torch.int32, device=device)
        self.num_items = torch.zeros(1, dtype=torch.int32, device=device)
        self.arrivals = torch.zeros(max_items * num_heads, dtype=torch.int32, device=device)
        self.partial_out = torch.empty(max_items * num_heads, tile_rows, head_dim, dtype=torch.float32, device=device)
        self.partial_sums = torch.empty(max_items * num_heads, 2, tile_rows, dtype=torch.float32, device=device)

    def fill(
        self,
        query_starts: Tensor,
        kv_lengths: Tensor,
        *,
        tile_tokens: int,
        min_tokens: int,
        max_tokens: int,
        target_items: int,
        kv_starts: Tensor | None = None,
        is_causal: bool = True,
        window: int | None = None,
        fixed_chunk: int = 0,
    ) -> None:
        """Queue the sequences that have `min_tokens … max_tokens` new tokens; one launch, nothing waits.

        Args:
            query_starts: int32 [S + 1].
            kv_lengths: int32 [S].
            tile_tokens: Tokens in a tile.
            min_tokens: Fewest new tokens of a sequence that belongs here.
            max_tokens: Most.
            target_items: Items, over all heads, that fill the device once.
            kv_starts: int32 [S]: keys before it are not this queue's (they are a shared prefix); None: zeros.
            is_causal: Whether a row sees only keys up to its own position.
            window: Keys that a row sees, its own included; None: all.
            fixed_chunk: Keys of a split, a multiple of `GRAIN`; 0: by cost.
        """
        num_seqs = kv_lengths.numel()
        if fixed_chunk % GRAIN:
            raise ConfigError(f"fixed_chunk is {fixed_chunk}, but it must be a multiple of {GRAIN}")
        if num_seqs == 0:
            self.num_items.zero_()
            return
        _make_items[(num_seqs,)](
            query_starts,
            kv_lengths,
            kv_lengths if kv_starts is None else kv_starts,
            self.items,
            self.num_items,
            num_seqs,
            target_items,
            fixed_chunk,
            _ALL_KEYS if window is None else window,
            self.max_items,
            TILE_TOKENS=tile_tokens,
            MIN_TOKENS=min_tokens,
            MAX_TOKENS=max_tokens,
            NUM_HEADS=self.num_heads,
            GRAIN=GRAIN,
            IS_CAUSAL=is_causal,
            HAS_STARTS=kv_starts is not None,
            MAX_SEQS=triton.next_power_of_2(num_seqs),
            BLOCK=128,
        )


_ALL_KEYS = 1 << 30


def max_items_for(
    *, max_seqs: int, max_tokens: int, tile_tokens: int, num_heads: int, target_items: int, chunks: int = 0
) -> int:
    """Most items that `WorkQueue.fill` can make of any batch within the bounds.

    A batch has at most `max_tokens / tile_tokens + max_seqs` tiles. Splitting makes at most one item for each
    `target_items / num_heads` of the cost, and every tile rounds up once.

    Args:
        max_seqs: Sequences in a batch.
        max_tokens: New tokens in a batch.
        tile_tokens: Tokens in a tile.
        num_heads: Heads over which items are unrolled.
        target_items: As for `fill`.
        chunks: With a fixed chunk: the most chunks that one sequence has.
    """
    tiles = min(max_tokens, max_tokens // tile_tokens + max_seqs)
    if chunks:
        return tiles * chunks
    return 2 * tiles + target_items // num_heads + 1
