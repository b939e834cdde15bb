"""The loading warp of the Hopper kernel: it deals items, and fetches queries, keys and values for the other partitions.

Programs are dealt items as they come free, by a counter that the last deal sets back to 0. What an item is goes to the
warpgroups through shared memory, beside its queries. Keys and values come page by page through the tensor memory
accelerator, from the last tile to the first; a box behind the last key is one outside the cache, which reads as zeros.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..gluon_names import load_tile


@gluon.jit
def _heads_of_a_run(items, D: gl.constexpr, NUM_KV_HEADS: gl.constexpr, RUN_BYTES: gl.constexpr):
    """Key heads whose keys and values of the longest sequence fit RUN_BYTES together; at least one."""
    keys = gl.maximum(gl.load(items + 4) - gl.load(items + 3), 1)
    return gl.minimum(gl.maximum(RUN_BYTES // (keys * D), 1), NUM_KV_HEADS)


@gluon.jit
def _read(items, item, num_works, run_heads, NUM_HEADS: gl.constexpr):
    """Head of an item, and of its record: row, position, rows, key begin, key end, splits, sequence, slot.

    Heads come in runs whose keys the L2 cache holds; within a run, all heads of a record are neighbours, so that
    items get shorter over the whole of the last run.
    """
    run = item // (num_works * run_heads)
    place = item - run * (num_works * run_heads)
    heads = gl.minimum(run_heads, NUM_HEADS - run * run_heads)
    at = items + place // heads * 9
    return (
        run * run_heads + place % heads, gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3),
        gl.load(at + 4), gl.load(at + 6), gl.load(at + 7), gl.load(at + 8),
    )  # fmt: skip


@gluon.jit
def _tell(told_s, w: gl.constexpr, head, row0, position, rows, begin, end, splits, slot):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    zero = gl.zeros([1], gl.int32, layout)
    told_s.index(w * 8 + 0).store(zero + head)
    told_s.index(w * 8 + 1).store(zero + row0)
    told_s.index(w * 8 + 2).store(zero + position)
    told_s.index(w * 8 + 3).store(zero + rows)
    told_s.index(w * 8 + 4).store(zero + begin)
    told_s.index(w * 8 + 5).store(zero + end)
    told_s.index(w * 8 + 6).store(zero + splits)
    told_s.index(w * 8 + 7).store(zero + slot)


@gluon.jit
def hear(told_s, w, field: gl.constexpr):
    """One int of what the loading warp told: head (-1: no more), row, position, rows, key begin, end, splits, slot."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(told_s.index(w * 8 + field).load(layout), 0)


@gluon.jit
def _load_page(desc, table, key, key_end, kv_head, barrier, tile, NUM_KV_HEADS: gl.constexpr, PAGE: gl.constexpr,
               BLOCK_N: gl.constexpr):  # fmt: skip
    # chunks begin at multiples of 64 keys, so a box of at most 64 never crosses a page
    BOX: gl.constexpr = PAGE if PAGE < 64 else 64
    for i in gl.static_range(BLOCK_N // BOX):
        n = key + i * BOX
        page = gl.load(table + n // PAGE, mask=n < key_end, other=0)
        row = (page * NUM_KV_HEADS + kv_head) * PAGE + n % PAGE
        load_tile(desc, [gl.where(n < key_end, row, -BOX), 0], barrier, tile.slice(i * BOX, BOX))


@gluon.jit
def load_tiles(q_desc, k_desc, v_desc, block_tables, items, num_works, dealt, bars, told_s, q_s, k_s, v_s,
               stride_table, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
               PAIR: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
               LISTENERS: gl.constexpr, RUN_BYTES: gl.constexpr):  # fmt: skip
    """Deal items to this program until there are none, and load their tiles.

    `bars` are barriers of the tiles that are loaded here; LISTENERS partitions are told of items, of which the first
    two get queries.
    """
    q_full, q_empty, k_full, v_full, k_empty, v_empty = bars
    num_items = num_works * NUM_HEADS
    tile_bytes: gl.constexpr = BLOCK_N * D * (k_s.dtype.primitive_bitwidth // 8)
    kv_bytes: gl.constexpr = 2 * (k_s.dtype.primitive_bitwidth // 8)
    UNITS: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    run_heads = _heads_of_a_run(items, D * kv_bytes, NUM_KV_HEADS, RUN_BYTES) * UNITS
    turn = 0
    num_tiles = 0
    item = gl.program_id(0)
    while item < num_items:
        dealt_before = gl.atomic_add(dealt, 1)
        head, row0, position, rows, begin, end, splits, sequence, slot = _read(
            items, item, num_works, run_heads, NUM_HEADS
        )
        if rows > 0:
            q_head = head * 2 if PAIR else head
            table = block_tables + sequence.to(gl.int64) * stride_table
            for w in gl.static_range(LISTENERS):
                mbarrier.wait(q_empty.index(w), (num_tiles & 1) ^ 1)
                _tell(told_s, w, head, row0, position, rows, begin, end, splits, slot)
                if w < 2:
                    mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                    q_row = row0 if PAIR else row0 + w * 64
                    q_column = (q_head + w) * D if PAIR else q_head * D
                    load_tile(q_desc, [q_row, q_column], q_full.index(w), q_s.index(w % 2))
                else:
                    mbarrier.arrive(q_full.index(w), count=1)
            num_tiles += 1
            num_blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
            for j in range(num_blocks):
                key = begin + (num_blocks - 1 - j) * BLOCK_N
                s = turn % STAGES
                phase = (turn // STAGES) & 1
                mbarrier.wait(k_empty.index(s), phase ^ 1)
                mbarrier.expect(k_full.index(s), tile_bytes)
                _load_page(k_desc, table, key, end, q_head // GROUP, k_full.index(s), k_s.index(s), NUM_KV_HEADS, PAGE,
                           BLOCK_N)  # fmt: skip
                mbarrier.wait(v_empty.index(s), phase ^ 1)
                mbarrier.expect(v_full.index(s), tile_bytes)
                _load_page(v_desc, table, key, end, q_head // GROUP, v_full.index(s), v_s.index(s), NUM_KV_HEADS, PAGE,
                           BLOCK_N)  # fmt: skip
                turn += 1
        # every item is followed by one deal, so this is the last of all programs
        if dealt_before == num_items - 1:
            gl.store(dealt, 0)
        item = dealt_before + gl.num_programs(0)
    for w in gl.static_range(LISTENERS):
        mbarrier.wait(q_empty.index(w), (num_tiles & 1) ^ 1)
        _tell(told_s, w, -1, 0, 0, 0, 0, 0, 0, 0)
        mbarrier.arrive(q_full.index(w), count=1)
