"""Groups of sequences that share their first keys: who computes which keys, worked out on the device.

A group is a run of sequences whose first `prefix_tokens` tokens lie in the same pages. The rows of all its members
against those keys are one dense tile of work (Hydragen, 2024), so the keys are read once for all. Groups may nest: one
inside another has a longer prefix and computes only what its parent does not.

Members with more than `SHORT_TOKENS` new tokens gain nothing, being bound by arithmetic: a group ends before its first
such member, and who comes after it attends to all of its keys alone. So does everyone whose group finds no room.

Shapes: S sequences, G groups.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP_INTS = 8
"""int32 of a group on the device: first row, rows, key begin, key end, parent or -1, first sequence, first slot of its
sums, number of splits. The last two are written where its items are made."""


@triton.jit(
    do_not_specialize_on_alignment=["query_starts", "groups"],
    do_not_specialize=["num_seqs", "num_groups", "short_tokens", "max_tiles"],
)
def _arrange_groups(
    query_starts,
    groups,
    own_begins,
    owners,
    records,
    num_seqs,
    num_groups,
    short_tokens,
    max_tiles,
    TILE_TOKENS: tl.constexpr,
    GROUP_INTS: tl.constexpr,
    MAX_SEQS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
):
    """A program for each sequence and each group; each looks at all of them."""
    program = tl.program_id(0)
    s = tl.arange(0, MAX_SEQS)
    start = tl.load(query_starts + s, mask=s < num_seqs, other=0)
    end = tl.load(query_starts + s + 1, mask=s < num_seqs, other=0)
    is_long = end - start > short_tokens
    g = tl.arange(0, MAX_GROUPS)
    is_group = g < num_groups
    first = tl.load(groups + g * 3, mask=is_group, other=0)
    count = tl.load(groups + g * 3 + 1, mask=is_group, other=0)
    prefix = tl.load(groups + g * 3 + 2, mask=is_group, other=0)
    prefix = tl.where(count > 0, prefix, 0)
    rows = tl.load(query_starts + first + count, mask=prefix > 0, other=0)
    rows -= tl.load(query_starts + first, mask=prefix > 0, other=0)
    prefix = tl.where(tl.cumsum(tl.cdiv(rows, TILE_TOKENS), 0) <= max_tiles, prefix, 0)

    own_group = program - num_seqs
    sequence = tl.where(own_group < 0, program, tl.sum(tl.where(g == own_group, first, 0), 0))
    own_prefix = tl.where(own_group < 0, 1 << 30, tl.sum(tl.where(g == own_group, prefix, 0), 0))
    last_long = tl.max(tl.where(is_long & (s <= sequence), s, -1), 0)
    is_holder = (first > last_long) & (first <= sequence) & (sequence < first + count)
    is_holder = is_holder & (prefix > 0) & (prefix < own_prefix)
    begin = tl.max(tl.where(is_holder, prefix, 0), 0)
    holder = tl.max(tl.where(is_holder & (prefix == begin), g, -1), 0)
    if own_group < 0:
        tl.store(own_begins + program, begin)
        tl.store(owners + program, holder)
    else:
        past = tl.min(tl.where(is_long & (s >= sequence), s, num_seqs), 0)
        past = tl.minimum(past, sequence + tl.sum(tl.where(g == own_group, count, 0), 0))
        row = tl.load(query_starts + sequence)
        num_rows = tl.where(own_prefix > 0, tl.load(query_starts + past) - row, 0)
        at = records + own_group * GROUP_INTS
        tl.store(at, row)
        tl.store(at + 1, num_rows)
        tl.store(at + 2, begin)
        tl.store(at + 3, own_prefix)
        tl.store(at + 4, holder)
        tl.store(at + 5, sequence)


class GroupTable:
    """What the groups of a step are on the device, and which of them each sequence belongs to.

    Args:
        max_seqs: Most sequences in a batch.
        max_groups: Most groups.
        max_tiles: Tiles of rows that there is memory for, of all groups together.
        device: Where it lives.
    """

    def __init__(self, *, max_seqs: int, max_groups: int, max_tiles: int, device: torch.device | str) -> None:
        self.max_seqs, self.max_groups, self.max_tiles = max_seqs, max_groups, max_tiles
        self.num_groups = 0
        self.own_begins = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self.owners = torch.full((max_seqs,), -1, dtype=torch.int32, device=device)
        self.records = torch.zeros(max_groups, GROUP_INTS, dtype=torch.int32, device=device)

    def fill(self, query_starts: Tensor, groups: Tensor, *, tile_tokens: int, short_tokens: int) -> None:
        """Work out `groups`; one launch, nothing waits.

        Args:
            query_starts: int32 [S + 1].
            groups: int32 [G, 3] rows (first sequence, sequences, tokens of the prefix); rows of zeros are padding.
                Checked by `limits.check_batch`.
            tile_tokens: Rows in a tile.
            short_tokens: Most new tokens of a member.
        """
        num_groups = groups.shape[0]
        num_seqs = query_starts.numel() - 1
        self.num_groups = num_groups
        _arrange_groups[(num_seqs + num_groups,)](
            query_starts, groups, self.own_begins, self.owners, self.records, num_seqs, num_groups, short_tokens,
            self.max_tiles, TILE_TOKENS=tile_tokens, GROUP_INTS=GROUP_INTS,
            MAX_SEQS=triton.next_power_of_2(self.max_seqs), MAX_GROUPS=triton.next_power_of_2(self.max_groups),
        )  # fmt: skip


@triton.jit
def add_group_sums(
    m,
    total,
    acc,
    token,
    head,
    is_row,
    group,
    records,
    group_out,
    group_sums,
    GROUP_INTS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    UNIT_HEADS: tl.constexpr,
    NUM_UNITS: tl.constexpr,
    HEAD_ROWS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """Add to the sums of rows what `group`, its parent and so on left for them.

    A tile of a group has TILE_ROWS rows for each of NUM_UNITS units of UNIT_HEADS heads; within it heads lie HEAD_ROWS
    and tokens TOKEN_ROWS apart. Maxima are in base 2, outputs are not normalised.
    """
    d = tl.arange(0, D_PADDED)
    while group >= 0:
        record = records + group * GROUP_INTS
        row0 = tl.load(record)
        num_tiles = tl.cdiv(tl.load(record + 1), TILE_TOKENS)
        slot = tl.load(record + 6)
        splits = tl.load(record + 7)
        group = tl.load(record + 4)
        place = token - row0
        first = slot + (num_tiles - 1 - place // TILE_TOKENS) * splits
        row = (head % UNIT_HEADS) * HEAD_ROWS + (place % TILE_TOKENS) * TOKEN_ROWS
        for i in tl.range(0, splits, 4):
            for j in tl.static_range(4):
                is_there = is_row & (i + j < splits)
                at = (first + i + j).to(tl.int64) * NUM_UNITS + head // UNIT_HEADS
                m_i = tl.load(group_sums + at * 2 * TILE_ROWS + row, mask=is_there, other=float("-inf"))
                total_i = tl.load(group_sums + (at * 2 + 1) * TILE_ROWS + row, mask=is_there, other=0.0)
                out_at = group_out + ((at * TILE_ROWS + row) * D)[:, None] + d[None, :]
                acc_i = tl.load(out_at, mask=is_there[:, None] & (d < D)[None, :], other=0.0)
                m_new = tl.maximum(m, m_i)
                m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                a = tl.exp2(m - m_safe)
                b = tl.exp2(m_i - m_safe)
                total = total * a + total_i * b
                acc = acc * a[:, None] + acc_i * b[:, None]
                m = m_new
    return m, total, acc
