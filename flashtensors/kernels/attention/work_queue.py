"""Work items for attention, made on the device from lengths that only the device knows.

A work item is a tile of query tokens of one sequence against a chunk of its keys, for all heads (heads are unrolled by
the kernels that read the queue). Where there are fewer tiles than multiprocessors the keys are split, so that decode
of one sequence and a short append on a long one fill the device as well as a large prefill does. Nothing here depends
on a length that the host knows: a captured CUDA graph stays right for any lengths.

Cost is tiles x visible keys; the chunk is about the number of keys for which the items of all heads number the target,
and the splits of one sequence are even. `fixed_chunk` overrides it: then the split of a sequence, and so the order of
every sum, depends on that sequence alone, and results are bitwise the same whatever else is in the batch.

Items of many keys come first, and within a sequence its longest tiles: programs end with short ones, so none works on
for long after others have ended. The shared keys of a group (`groups.py`) are items like any other, whose sums are left
to its members.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ConfigError
from .groups import GROUP_INTS, GroupTable

RECORD_INTS = 9
"""int32 of one item: first row, its position, rows, key begin, key end, split, number of splits, sequence, slot of the
sums it leaves. An unused record has no rows. Items of a group have split -1 and 0 splits: its members add them up."""

GRAIN = 64
"""Keys by which chunks grow; a multiple of every key tile that splits."""

_ALL_KEYS = 1 << 30


@triton.jit(
    do_not_specialize_on_alignment=["query_starts", "kv_lengths", "own_begins", "groups"],
    do_not_specialize=[
        "num_seqs", "num_groups", "target_items", "fixed_chunk", "window", "max_items", "min_tokens", "max_tokens",
    ],
)  # fmt: skip
def _make_items(
    query_starts,
    kv_lengths,
    own_begins,
    groups,
    items,
    counts,
    num_seqs,
    num_groups,
    target_items,
    fixed_chunk,
    window,
    max_items,
    min_tokens,
    max_tokens,
    TILE_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GRAIN: tl.constexpr,
    RECORD_INTS: tl.constexpr,
    GROUP_INTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_BEGINS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    MAX_UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each unit, a sequence or a group: all scan all (they fit in one block), each writes its own."""
    unit = tl.program_id(0)
    u = tl.arange(0, MAX_UNITS)
    is_sequence = u < num_seqs
    row = tl.load(query_starts + u, mask=is_sequence, other=0)
    num_tokens = tl.load(query_starts + u + 1, mask=is_sequence, other=0) - row
    kv_length = tl.load(kv_lengths + u, mask=is_sequence, other=0)
    num_tokens = tl.where((num_tokens >= min_tokens) & (num_tokens <= max_tokens), num_tokens, 0)
    begin_key = tl.zeros([MAX_UNITS], tl.int32)
    if HAS_BEGINS:
        begin_key = tl.load(own_begins + u, mask=is_sequence, other=0)
    is_group = u >= num_seqs
    if HAS_GROUPS:
        group = groups + (u - num_seqs) * GROUP_INTS
        is_group = is_group & (u < num_seqs + num_groups)
        row += tl.load(group, mask=is_group, other=0)
        num_tokens += tl.load(group + 1, mask=is_group, other=0)
        begin_key += tl.load(group + 2, mask=is_group, other=0)
        kv_length += tl.load(group + 3, mask=is_group, other=0)
    num_tiles = tl.cdiv(num_tokens, TILE_TOKENS)
    # keys from the window of a tile's first row to the last that its last row sees
    span = TILE_TOKENS if IS_CAUSAL else num_tokens
    seen = tl.maximum(tl.minimum(kv_length - begin_key, window + span + GRAIN), 0)
    cost = tl.sum((num_tiles * tl.cdiv(seen, GRAIN)).to(tl.int64), 0) * NUM_HEADS
    chunk = tl.maximum(tl.cdiv(cost, target_items), 1).to(tl.int32) * GRAIN
    chunk = tl.where(fixed_chunk > 0, fixed_chunk, chunk)
    # a remainder under a quarter of a chunk is not worth an item: it would open a second round for nothing
    num_splits = tl.maximum((seen + chunk - 1 - tl.where(fixed_chunk > 0, 0, chunk // 4)) // chunk, 1)
    count = num_tiles * num_splits
    num_slots = tl.where(is_group | (num_splits > 1), count, 0)
    slot_end = tl.cumsum(num_slots, 0)
    if unit == 0:
        tl.store(counts, tl.minimum(tl.sum(count, 0), max_items))
        tl.store(counts + 1, tl.sum(num_slots, 0))

    is_this = u == unit
    tiles = tl.sum(tl.where(is_this, num_tiles, 0), 0)
    splits = tl.sum(tl.where(is_this, num_splits, 0), 0)
    keys = tl.cdiv(seen, num_splits)
    own_keys = tl.sum(tl.where(is_this, keys, 0), 0)
    is_before = (keys > own_keys) | ((keys == own_keys) & (u < unit))
    first_item = tl.sum(tl.where(is_before, count, 0), 0)
    first_slot = tl.sum(tl.where(is_this, slot_end - num_slots, 0), 0)
    first_row = tl.sum(tl.where(is_this, row, 0), 0)
    tokens = tl.sum(tl.where(is_this, num_tokens, 0), 0)
    length = tl.sum(tl.where(is_this, kv_length, 0), 0)
    first_key = tl.sum(tl.where(is_this, begin_key, 0), 0)
    even = tl.cdiv(tl.cdiv(tl.sum(tl.where(is_this, seen, 0), 0), splits), GRAIN) * GRAIN
    chunk = tl.where(fixed_chunk > 0, fixed_chunk, tl.maximum(even, GRAIN))
    is_shared = unit >= num_seqs
    sequence = unit
    shared_splits = tl.maximum(tl.cdiv(length - first_key, chunk), 1)
    if HAS_GROUPS:  # noqa: SIM102 - this is known when the kernel compiles, what follows is not
        if is_shared:
            record = groups + (unit - num_seqs) * GROUP_INTS
            sequence = tl.load(record + 5)
            tl.store(record + 6, first_slot)
            tl.store(record + 7, shared_splits)
    for block in range(0, tiles * splits, BLOCK):
        i = block + tl.arange(0, BLOCK)
        split = i % splits
        token = (tiles - 1 - i // splits) * TILE_TOKENS
        rows = tl.minimum(TILE_TOKENS, tokens - token)
        # rows of a group stand behind its keys, so that no mask hides any
        position = tl.where(is_shared, length, length - tokens + token)
        last = tl.where(IS_CAUSAL & (unit < num_seqs), position + rows, length)
        begin = tl.maximum(position - window + 1, first_key) // GRAIN * GRAIN
        begin = tl.maximum(begin, first_key)
        used = tl.maximum(tl.cdiv(last - begin, chunk), 1)
        key = begin + split * chunk
        at = items + (first_item + i) * RECORD_INTS
        is_item = (i < tiles * splits) & (first_item + i < max_items)
        tl.store(at, first_row + token, mask=is_item)
        tl.store(at + 1, position, mask=is_item)
        tl.store(at + 2, tl.where(split < used, rows, 0), mask=is_item)
        tl.store(at + 3, key, mask=is_item)
        tl.store(at + 4, tl.minimum(key + chunk, last), mask=is_item)
        tl.store(at + 5, tl.where(is_shared, -1, split), mask=is_item)
        tl.store(at + 6, tl.where(is_shared, 0, used), mask=is_item)
        tl.store(at + 7, sequence + i * 0, mask=is_item)
        slot = tl.where(is_shared, i // splits * shared_splits + split, i)
        tl.store(at + 8, first_slot + slot, mask=is_item)


class WorkQueue:
    """Items of one kind of tile, with room for the sums that splits and groups must hand over.

    Args:
        max_seqs: Most sequences in a batch.
        max_tokens: Most rows in a batch.
        max_groups: Most groups whose keys are queued here.
        max_group_tiles: Most tiles of those.
        num_heads: Heads over which a kernel unrolls every item.
        head_dim: Elements in a row.
        tile_tokens: Tokens in a tile.
        tile_rows: Rows of a tile for one such head.
        max_target: Most that `fill` is given as `target_items`.
        max_programs: Most that a launch has.
        chunks: With a fixed chunk: the most chunks that one sequence has; else 0.
        device: Where it lives.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        max_tokens: int,
        max_groups: int = 0,
        max_group_tiles: int = 0,
        num_heads: int,
        head_dim: int,
        tile_tokens: int,
        tile_rows: int,
        max_target: int,
        max_programs: int,
        chunks: int = 0,
        device: torch.device | str,
    ) -> None:
        self.num_heads, self.tile_tokens, self.tile_rows = num_heads, tile_tokens, tile_rows
        self.max_target, self.max_units = max_target, max_seqs + max_groups
        tiles = min(max_tokens, max_tokens // tile_tokens + max_seqs)
        # n > 1 splits of s keys by chunk c have s > 1.25 c, so n <= s / c + 0.75 <= 1.6 s / c; chunks of c keys number
        # the target at most
        split_items = tiles * chunks if chunks else max_target * 8 // (5 * num_heads) + 1
        self.max_slots = split_items + max_group_tiles
        # programs read a record before they know whether it is one
        self.max_items = max(tiles + self.max_slots, max_programs // num_heads + 1)
        rows = self.max_slots * num_heads * tile_rows
        self.items = torch.zeros(self.max_items, RECORD_INTS, dtype=torch.int32, device=device)
        self.counts = torch.zeros(3, dtype=torch.int32, device=device)
        self.arrivals = torch.zeros(self.max_slots * num_heads, dtype=torch.int32, device=device)
        self.partial_out = torch.empty(rows, head_dim, dtype=torch.float32, device=device)
        self.partial_sums = torch.empty(rows * 2, dtype=torch.float32, device=device)

    def fill(
        self,
        query_starts: Tensor,
        kv_lengths: Tensor,
        *,
        min_tokens: int,
        max_tokens: int,
        target_items: int,
        own_begins: Tensor | None = None,
        groups: GroupTable | None = None,
        is_causal: bool = True,
        window: int | None = None,
        fixed_chunk: int = 0,
    ) -> None:
        """Queue the sequences that have `min_tokens … max_tokens` new tokens, and groups; one launch, nothing waits.

        Args:
            query_starts: int32 [S + 1].
            kv_lengths: int32 [S].
            min_tokens: Fewest new tokens of a sequence that belongs here.
            max_tokens: Most.
            target_items: Items, over all heads, that fill the device once.
            own_begins: int32 [S]: keys before it are not this queue's (a group's are); None: zeros.
            groups: Those whose shared keys are queued here; None: none.
            is_causal: Whether a row sees only keys up to its own position.
            window: Keys that a row sees, its own included; None: all.
            fixed_chunk: Keys of a split, a multiple of `GRAIN`; 0: by cost.
        """
        num_seqs = kv_lengths.numel()
        if fixed_chunk % GRAIN:
            raise ConfigError(f"fixed_chunk is {fixed_chunk}, but it must be a multiple of {GRAIN}")
        if num_seqs == 0:
            self.counts.zero_()
            return
        num_groups = 0 if groups is None else groups.num_groups
        _make_items[(num_seqs + num_groups,)](
            query_starts, kv_lengths, kv_lengths if own_begins is None else own_begins,
            kv_lengths if groups is None else groups.records, self.items, self.counts, num_seqs, num_groups,
            target_items, fixed_chunk, _ALL_KEYS if window is None else window, self.max_items, min_tokens,
            max_tokens, TILE_TOKENS=self.tile_tokens, NUM_HEADS=self.num_heads, GRAIN=GRAIN, RECORD_INTS=RECORD_INTS,
            GROUP_INTS=GROUP_INTS, IS_CAUSAL=is_causal, HAS_BEGINS=own_begins is not None,
            HAS_GROUPS=groups is not None, MAX_UNITS=triton.next_power_of_2(self.max_units), BLOCK=128,
            num_warps=1 if self.max_units <= 512 else 4,
        )  # fmt: skip
