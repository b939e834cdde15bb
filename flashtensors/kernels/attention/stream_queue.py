"""Equal shares of a step's decode, cut on the device from lengths that only the device knows.

A tile is the rows of a few new tokens of one sequence, for one key head; its keys are counted in grains. All grains of
all tiles stand in one line, by sequence, token, head and key, and each program of a launch takes as many of them, one
after the other: it streams its keys without a break, and all end together, whatever the lengths are (stream-K: Osama
et al., 2023). A tile that a share cuts is left as pieces, which belong to consecutive programs.

Where lengths differ, each tile stands in that line with a few units more than its grains, which come before them: as
much as its end costs, so that a program of many short tiles gets fewer keys. 256 sequences of 100 to 2,000 keys take
143 µs with heads of 64 dims on an H200, 157 without; as many of one length 143.

A piece leaves its sums in a slot of its program: one for the piece that begins a tile, one for any other, of which a
program has no more. So the programs of a tile's pieces, and their slots, follow from where the tile begins.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_INTS = 10
"""int32 of one tile, heads aside: first row, its position, rows, sequence, position of the sequence's first new token,
key begin, key end, unit of its first head's first grain, grains of a head, units from one head to the next."""

GRAIN = 64
"""Keys of a grain."""

_LEAST_GRAINS = 8
"""Of a program, from which on ends of tiles are shared out too."""

_ALL_KEYS = 1 << 30


@triton.jit(
    do_not_specialize_on_alignment=["query_starts", "kv_lengths"],
    do_not_specialize=["num_seqs", "window", "max_tokens", "num_programs", "least_share"],
)
def _cut_shares(
    query_starts,
    kv_lengths,
    tiles,
    starts,
    share_ptr,
    num_seqs,
    window,
    max_tokens,
    num_programs,
    least_share,
    TILE_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GRAIN: tl.constexpr,
    END_GRAINS: tl.constexpr,
    LEAST_GRAINS: tl.constexpr,
    TILE_INTS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    MAX_SEQS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each sequence and each share: all scan all sequences, each writes its own."""
    u = tl.arange(0, MAX_SEQS)
    is_sequence = u < num_seqs
    row = tl.load(query_starts + u, mask=is_sequence, other=0)
    num_tokens = tl.load(query_starts + u + 1, mask=is_sequence, other=0) - row
    length = tl.load(kv_lengths + u, mask=is_sequence, other=0)
    num_tokens = tl.where(num_tokens <= max_tokens, num_tokens, 0)
    num_tiles = tl.cdiv(num_tokens, TILE_TOKENS)
    begin = tl.maximum(length - num_tokens - window + 1, 0) // GRAIN * GRAIN
    grains = tl.maximum(tl.cdiv(length - begin, GRAIN), 1)
    tile_end = tl.cumsum(num_tiles, 0)
    longest = tl.max(tl.where(num_tiles > 0, grains, 0), 0)
    shortest = tl.min(tl.where(num_tiles > 0, grains, longest), 0)
    has_many = tl.sum(num_tiles * grains, 0) * NUM_HEADS >= num_programs * LEAST_GRAINS
    end_units = tl.where((longest > shortest) & has_many, END_GRAINS, 0)
    tile_units = grains + end_units
    units = num_tiles * tile_units * NUM_HEADS
    unit_end = tl.cumsum(units, 0)
    total = tl.sum(units, 0)
    share = tl.maximum(tl.cdiv(total, num_programs), least_share)

    me = tl.program_id(0)
    if me <= num_programs:
        unit = me * share
        place = tl.sum(((unit_end <= unit) & is_sequence).to(tl.int32), 0)
        is_mine = u == place
        within = unit - tl.sum(tl.where(is_mine, unit_end - units, 0), 0)
        own = tl.maximum(tl.sum(tl.where(is_mine, tile_units, 0), 0), 1)
        tile = tl.sum(tl.where(is_mine, tile_end - num_tiles, 0), 0) * NUM_HEADS + within // own
        is_there = unit < total
        tl.store(starts + 2 * me, tl.where(is_there, tile, tl.sum(num_tiles, 0) * NUM_HEADS))
        tl.store(starts + 2 * me + 1, tl.where(is_there, tl.maximum(within % own - end_units, 0), 0))
        if me == 0:
            tl.store(share_ptr, share)

    is_mine = u == me
    count = tl.sum(tl.where(is_mine, num_tiles, 0), 0)
    first_tile = tl.sum(tl.where(is_mine, tile_end, 0), 0) - count
    first_unit = tl.sum(tl.where(is_mine, unit_end - units, 0), 0)
    own_units = tl.sum(tl.where(is_mine, tile_units, 0), 0)
    own_row = tl.sum(tl.where(is_mine, row, 0), 0)
    tokens = tl.sum(tl.where(is_mine, num_tokens, 0), 0)
    own_length = tl.sum(tl.where(is_mine, length, 0), 0)
    for block in range(0, count, BLOCK):
        i = block + tl.arange(0, BLOCK)
        is_tile = i < count
        token = i * TILE_TOKENS
        rows = tl.minimum(TILE_TOKENS, tokens - token)
        position = own_length - tokens + token
        at = tiles + (first_tile + i) * TILE_INTS
        tl.store(at, own_row + token, mask=is_tile)
        tl.store(at + 1, position, mask=is_tile)
        tl.store(at + 2, rows, mask=is_tile)
        tl.store(at + 3, me + i * 0, mask=is_tile)
        tl.store(at + 4, own_length - tokens + i * 0, mask=is_tile)
        tl.store(at + 5, tl.maximum(position - window + 1, 0) // GRAIN * GRAIN, mask=is_tile)
        tl.store(at + 6, position + rows if IS_CAUSAL else own_length + i * 0, mask=is_tile)
        tl.store(at + 7, first_unit + i * own_units * NUM_HEADS + end_units, mask=is_tile)
        tl.store(at + 8, own_units - end_units + i * 0, mask=is_tile)
        tl.store(at + 9, own_units + i * 0, mask=is_tile)


class StreamQueue:
    """Tiles of a step, the share of each program, and room for the sums that pieces hand over.

    Args:
        max_seqs: Most sequences in a batch.
        max_rows: Most rows in a batch.
        num_heads: Key-value heads.
        head_dim: Elements in a row.
        tile_tokens: Tokens in a tile.
        tile_rows: Rows of a tile, heads of a group included.
        num_programs: Programs that share the work.
        device: Where it lives.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        max_rows: int,
        num_heads: int,
        head_dim: int,
        tile_tokens: int,
        tile_rows: int,
        num_programs: int,
        device: torch.device | str,
    ) -> None:
        self.num_heads, self.tile_tokens, self.num_programs = num_heads, tile_tokens, num_programs
        self.max_seqs, self.end_grains = max_seqs, max(1, 128 // head_dim)
        max_tiles = min(max_rows, max_rows // tile_tokens + max_seqs)
        rows = 2 * num_programs * tile_rows
        self.tiles = torch.zeros(max_tiles, TILE_INTS, dtype=torch.int32, device=device)
        self.starts = torch.zeros(num_programs + 1, 2, dtype=torch.int32, device=device)
        self.share = torch.ones(1, dtype=torch.int32, device=device)
        self.arrivals = torch.zeros(num_programs, dtype=torch.int32, device=device)
        self.partial_out = torch.empty(rows, head_dim, dtype=torch.float32, device=device)
        self.partial_sums = torch.empty(rows * 2, dtype=torch.float32, device=device)

    def fill(
        self,
        query_starts: Tensor,
        kv_lengths: Tensor,
        *,
        max_tokens: int,
        is_causal: bool = True,
        window: int | None = None,
        least_share: int = 1,
    ) -> None:
        """Share out the sequences that have 1 … `max_tokens` new tokens; one launch, nothing waits.

        Args:
            query_starts: int32 [S + 1].
            kv_lengths: int32 [S].
            max_tokens: Most new tokens of a sequence that belongs here.
            is_causal: Whether a row sees only keys up to its own position.
            window: Keys that a row sees, its own included; None: all.
            least_share: Fewest grains of a program that has any.
        """
        num_seqs = kv_lengths.numel()
        if num_seqs == 0:
            self.starts.zero_()
            return
        _cut_shares[(max(num_seqs, self.num_programs + 1),)](
            query_starts, kv_lengths, self.tiles, self.starts, self.share, num_seqs,
            _ALL_KEYS if window is None else window, max_tokens, self.num_programs, least_share,
            TILE_TOKENS=self.tile_tokens, NUM_HEADS=self.num_heads, GRAIN=GRAIN, END_GRAINS=self.end_grains,
            LEAST_GRAINS=_LEAST_GRAINS, TILE_INTS=TILE_INTS, IS_CAUSAL=is_causal,
            MAX_SEQS=triton.next_power_of_2(self.max_seqs), BLOCK=16,
            num_warps=1 if self.max_seqs <= 512 else 4,
        )  # fmt: skip
