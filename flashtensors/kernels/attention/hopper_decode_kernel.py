"""Decode and short appends for Hopper: a warp streams keys and values, four others compute behind it.

Written in Gluon. Each program has a share of `stream_queue.py`: a warp walks over its pieces and fills a ring
of key and value tiles by the tensor memory accelerator, running ahead into the next piece while the last is still
computed, so about 100 KB a program are under way at all times. Four warps follow, each with a quarter of a step's keys,
on the matrix units that take 16 rows, as many as a tile has (tokens x heads of a group): `wgmma` would compute 64, and
took up to a tenth longer with heads of 64 dims.

Of a sequence's last keys only boxes of `TAIL` keys are read that hold any: whole blocks would be 3 % more bytes where
sequences have a thousand keys. With `READS_AHEAD` the ring is filled with keys of earlier steps before the kernel in
front, which appends the new ones, has ended.

Pieces of tiles that a share cuts come first, so that what is merged is merged while other keys arrive. The program
that leaves the last piece of a tile adds all up in the order of keys: no result depends on who was last.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAssignmentType=false

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..gluon_barriers import make_barriers
from ..gluon_names import load_tile, wait_for_partition
from .hopper_pieces import finish_rows, merge_pieces


@gluon.jit
def _read_share(starts):
    """First tile and grain of this program, those of the next one, and how many pieces lie between."""
    at = starts + 2 * gl.program_id(0)
    first, first_grain, last, last_grain = gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)
    has_tail = ((last_grain > 0) & (last > first)).to(gl.int32)
    num_pieces = gl.where(last > first, last - first + has_tail, (last_grain > first_grain).to(gl.int32))
    return first, first_grain, last, last_grain, has_tail, num_pieces


@gluon.jit
def _find_piece(i, share, NUM_KV_HEADS: gl.constexpr):
    """Tile and head of a piece; the one that the next program goes on with comes first."""
    first, _, last, _, has_tail, _ = share
    index = gl.where((has_tail > 0) & (i == 0), last, first + i - has_tail)
    return index // NUM_KV_HEADS, index % NUM_KV_HEADS, index


@gluon.jit
def _keys_of(tile_at, index, share, GRAIN: gl.constexpr):
    """Key begin and end of a piece, its first grain, and the grains of the whole."""
    first, first_grain, last, last_grain, _, _ = share
    tile_begin, tile_end, grains = gl.load(tile_at + 5), gl.load(tile_at + 6), gl.load(tile_at + 8)
    grain = gl.where(index == first, first_grain, 0)
    end_grain = gl.where(index == last, last_grain, grains)
    begin = tile_begin + grain * GRAIN
    end = gl.minimum(tile_begin + end_grain * GRAIN, tile_end)
    return begin, end, grain, grains, (grain == 0) & (end_grain == grains)


@gluon.jit
def _load_box(k_desc, v_desc, row, full, place, IS_KEY: gl.constexpr):
    if IS_KEY:
        load_tile(k_desc, [row, 0], full, place)
    else:
        load_tile(v_desc, [row, 0], full, place)


@gluon.jit
def _load_share(k_desc, v_desc, k_tail_desc, v_tail_desc, block_tables, tiles, starts, full, empty, ring, stride_table,
                NUM_KV_HEADS: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
                SLOTS: gl.constexpr, GRAIN: gl.constexpr, TILE_INTS: gl.constexpr, TAIL: gl.constexpr,
                READS_AHEAD: gl.constexpr):  # fmt: skip
    BOX: gl.constexpr = min(PAGE, BLOCK_N, GRAIN)
    BOXES: gl.constexpr = BLOCK_N // BOX
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 32, layout)
    share = _read_share(starts)
    rows = lane
    turn = 0
    for i in range(share[5]):
        tile, head, index = _find_piece(i, share, NUM_KV_HEADS)
        tile_at = tiles + tile * TILE_INTS
        begin, end, _, _, _ = _keys_of(tile_at, index, share, GRAIN)
        table = block_tables + gl.load(tile_at + 3).to(gl.int64) * stride_table
        old_end = gl.minimum(end, gl.load(tile_at + 4))
        num_blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
        for j in range(num_blocks):
            key = begin + j * BLOCK_N
            # 32 boxes are looked up at a time, so that their pages are at hand when there is room
            if j % (32 // BOXES) == 0:
                n = key + lane * BOX
                page = gl.load(table + n // PAGE, mask=n < end, other=0)
                rows = (page * NUM_KV_HEADS + head) * PAGE + n % PAGE
            if READS_AHEAD:  # noqa: SIM102 - known when it is compiled
                if key + BLOCK_N > old_end:
                    tl.extra.cuda.gdc_wait()
            at = j % (32 // BOXES) * BOXES
            num_tails = gl.minimum(end - key + TAIL - 1, BLOCK_N) // TAIL
            for half in gl.static_range(2):
                slot = turn % SLOTS
                mbarrier.wait(empty.index(slot), ((turn // SLOTS) & 1) ^ 1)
                for t in gl.static_range(1, BLOCK_N // TAIL + 1):
                    mbarrier.expect(full.index(slot), t * TAIL * D * 2, pred=num_tails == t)
                if num_tails == BLOCK_N // TAIL:
                    for b in gl.static_range(BOXES):
                        row = gl.sum(gl.where(lane == at + b, rows, 0), 0)
                        _load_box(k_desc, v_desc, row, full.index(slot), ring.index(slot).slice(b * BOX, BOX),
                                  half == 0)  # fmt: skip
                else:
                    for t in gl.static_range(BLOCK_N // TAIL - 1):
                        if t < num_tails:
                            row = gl.sum(gl.where(lane == at + t * TAIL // BOX, rows, 0), 0) + t * TAIL % BOX
                            _load_box(k_tail_desc, v_tail_desc, row, full.index(slot),
                                      ring.index(slot).slice(t * TAIL, TAIL), half == 0)  # fmt: skip
                turn += 1


@gluon.jit
def _mask(S, key, end, position, span_begin, tree, window, IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
          HAS_TREE: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    n = key + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    is_seen = (n < end)[None, :] & (position > -(1 << 30))[:, None]
    if HAS_TREE:
        drafted = n - span_begin
        bit = (tree[:, None] >> gl.maximum(drafted, 0)[None, :].to(gl.int64)) & 1
        is_seen = is_seen & ((drafted < 0)[None, :] | (bit == 1))
    if IS_CAUSAL:
        is_seen = is_seen & (n[None, :] <= position[:, None])
    if HAS_WINDOW:
        is_seen = is_seen & (n[None, :] > position[:, None] - window)
    return gl.where(is_seen, S, float("-inf"))


@gluon.jit
def _attend_share(q_ptr, out_ptr, lse_ptr, sinks_ptr, tree_ptr, tiles, starts, share_ptr, partial_out, partial_sums,
                  arrivals, full, empty, ring, scale_log2, cap_log2, window, stride_qt, stride_qh, stride_ot, stride_oh,
                  NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
                  D: gl.constexpr, SLOTS: gl.constexpr, GRAIN: gl.constexpr, TILE_INTS: gl.constexpr,
                  IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr, HAS_TREE: gl.constexpr,
                  HAS_SINKS: gl.constexpr, HAS_LSE: gl.constexpr, READS_AHEAD: gl.constexpr):  # fmt: skip
    if READS_AHEAD:
        tl.extra.cuda.gdc_wait()
    dtype: gl.constexpr = ring.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 4], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    factor = 1.0 if HAS_CAP else scale_log2
    zeros = gl.zeros([16, BLOCK_N], gl.float32, layout)
    r = gl.arange(0, 16, gl.SliceLayout(1, layout))
    rq = gl.arange(0, 16, gl.SliceLayout(1, left))
    dq = gl.arange(0, D, gl.SliceLayout(0, left))
    d = gl.arange(0, D, gl.SliceLayout(0, layout))
    nv = gl.arange(0, BLOCK_N, gl.SliceLayout(1, right))
    share = _read_share(starts)
    turn = 0
    for i in range(share[5]):
        tile, kv_head, index = _find_piece(i, share, NUM_KV_HEADS)
        tile_at = tiles + tile * TILE_INTS
        row0, position0, span_begin = gl.load(tile_at), gl.load(tile_at + 1), gl.load(tile_at + 4)
        num_rows = gl.load(tile_at + 2) * GROUP
        begin, end, grain, grains, is_whole = _keys_of(tile_at, index, share, GRAIN)
        q_at = (row0 + rq // GROUP).to(gl.int64) * stride_qt + (kv_head * GROUP + rq % GROUP) * stride_qh
        q = gl.load(q_ptr + q_at[:, None] + dq[None, :], mask=(rq < num_rows)[:, None], other=0.0)
        position = position0 + r // GROUP
        tree = position.to(gl.int64)
        if HAS_TREE:
            tree = gl.load(tree_ptr + row0 + r // GROUP, mask=r < num_rows, other=0)
        # keys before this one need no mask
        seen_end = end
        if HAS_TREE:
            seen_end = gl.minimum(end, span_begin)
        elif IS_CAUSAL:
            seen_end = gl.minimum(end, position0 + 1)
        # finite, so that a row which sees nothing yet does not subtract infinities; no row: probabilities of 0
        m = gl.where(r < num_rows, -1.0e30, 1.0e30)
        # of each thread's keys alone: added up at the end
        sums = zeros
        acc = gl.zeros([16, D], gl.float32, layout)
        for key in range(begin, end, BLOCK_N):
            slot = turn % SLOTS
            mbarrier.wait(full.index(slot), (turn // SLOTS) & 1)
            S = mma_v2(q, ring.index(slot).permute((1, 0)).load(right), zeros)
            if HAS_CAP:
                e = gl.exp2(-2.8853900817779268 * gl.abs(S * (scale_log2 / cap_log2)))
                S = gl.where(S < 0, -cap_log2, cap_log2) * ((1 - e) / (1 + e))
            must_mask = key + BLOCK_N > seen_end
            if HAS_WINDOW:
                must_mask = must_mask | (key <= position0 + 15 - window)
            if must_mask:
                S = _mask(S, key, end, position, span_begin, tree, window, IS_CAUSAL, HAS_WINDOW, HAS_TREE, BLOCK_N,
                          layout)  # fmt: skip
            m_next = gl.maximum(m, gl.max(S, 1) * factor)
            wait_for_partition()
            mbarrier.arrive(empty.index(slot), count=1)
            turn += 1
            shrink = gl.exp2(m - m_next)
            p = gl.exp2(S * factor - m_next[:, None])
            sums = sums * shrink[:, None] + p
            m = m_next
            acc = acc * shrink[:, None]
            p = gl.convert_layout(p.to(dtype), left)
            slot = turn % SLOTS
            mbarrier.wait(full.index(slot), (turn // SLOTS) & 1)
            v = ring.index(slot).load(right)
            if key + BLOCK_N > end:
                v = gl.where((key + nv < end)[:, None], v, gl.zeros([BLOCK_N, D], dtype, right))
            acc = mma_v2(p, v, acc)
            wait_for_partition()
            mbarrier.arrive(empty.index(slot), count=1)
            turn += 1

        total = gl.sum(sums, 1)
        if is_whole:
            finish_rows(out_ptr, lse_ptr, sinks_ptr, row0, kv_head, r, d, r < num_rows, m, total, acc, stride_ot,
                    stride_oh, NUM_KV_HEADS, GROUP, HAS_SINKS, HAS_LSE)  # fmt: skip
        else:
            place = 2 * gl.program_id(0) + gl.where(grain == 0, 1, 0)
            gl.store(partial_out + (place * ROWS + r)[:, None] * D + d[None, :], acc, mask=(r < num_rows)[:, None])
            gl.store(partial_sums + place * (2 * ROWS) + r, m, mask=r < num_rows)
            gl.store(partial_sums + place * (2 * ROWS) + ROWS + r, total, mask=r < num_rows)
            wait_for_partition()
            first_unit = gl.load(tile_at + 7) + kv_head * gl.load(tile_at + 9)
            per_program = gl.load(share_ptr)
            first_program = first_unit // per_program
            num_pieces = (first_unit + grains - 1) // per_program - first_program + 1
            arrived = gl.atomic_add(arrivals + first_program, 1, sem="acq_rel")
            if arrived == num_pieces - 1:
                merge_pieces(out_ptr, lse_ptr, sinks_ptr, partial_out, partial_sums, first_program, num_pieces, row0,
                       kv_head, num_rows, stride_ot, stride_oh, NUM_KV_HEADS, GROUP, ROWS, D, HAS_SINKS,
                       HAS_LSE)  # fmt: skip
                gl.store(arrivals + first_program, 0)


@gluon.jit(
    do_not_specialize_on_alignment=["block_tables", "tree_ptr"], do_not_specialize=["window", "stride_table"]
)  # fmt: skip
def attend_stream(q_ptr, k_desc, v_desc, k_tail_desc, v_tail_desc, out_ptr, lse_ptr, sinks_ptr, tree_ptr, tiles, starts,
                  share_ptr, partial_out, partial_sums, arrivals, block_tables, scale_log2, cap_log2, window, stride_qt,
                  stride_qh, stride_ot, stride_oh, stride_table, NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
                  ROWS: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
                  GRAIN: gl.constexpr, TILE_INTS: gl.constexpr, TAIL: gl.constexpr, IS_CAUSAL: gl.constexpr,
                  HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr, HAS_TREE: gl.constexpr, HAS_SINKS: gl.constexpr,
                  HAS_LSE: gl.constexpr, READS_AHEAD: gl.constexpr):  # fmt: skip
    """Two programs for each multiprocessor; each sets up its ring and lets its two partitions run.

    Args:
        READS_AHEAD: Whether keys of earlier steps, and the plan, are read before the kernel in front has ended.
    """
    ring = gl.allocate_shared_memory(
        k_desc.dtype, [SLOTS, BLOCK_N, D], gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], k_desc.dtype)
    )
    full, empty = make_barriers(SLOTS, 1), make_barriers(SLOTS, 1)
    # this program may have been launched before the kernel in front of it has ended, as the one behind it may be
    tl.extra.cuda.gdc_launch_dependents()
    if not READS_AHEAD:
        tl.extra.cuda.gdc_wait()
    gl.warp_specialize([
        (_attend_share, (q_ptr, out_ptr, lse_ptr, sinks_ptr, tree_ptr, tiles, starts, share_ptr, partial_out,
                         partial_sums, arrivals, full, empty, ring, scale_log2, cap_log2, window, stride_qt, stride_qh,
                         stride_ot, stride_oh, NUM_KV_HEADS, GROUP, ROWS, BLOCK_N, D, SLOTS, GRAIN, TILE_INTS,
                         IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_TREE, HAS_SINKS, HAS_LSE, READS_AHEAD)),
        (_load_share, (k_desc, v_desc, k_tail_desc, v_tail_desc, block_tables, tiles, starts, full, empty, ring,
                       stride_table, NUM_KV_HEADS, PAGE, BLOCK_N, D, SLOTS, GRAIN, TILE_INTS, TAIL, READS_AHEAD)),
    ], [1], [24])  # fmt: skip
