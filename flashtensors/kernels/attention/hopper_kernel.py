"""Attention of many query rows over pages on Hopper's matrix units, in Gluon.

Partitions of a persistent program: one warp that loads tiles (`hopper_load.py`), two warpgroups of 64 rows each that
compute (`hopper_attend.py`), and for fp8 caches a third that converts what was loaded (`hopper_convert.py`).

Work items (`work_queue.py`) have a tile of 64 tokens when two query heads share keys (a warpgroup for each head), else
of 128 tokens. Splits leave their sums to `merge_splits`, groups to their members.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..gluon_barriers import make_barriers
from .hopper_attend import attend
from .hopper_convert import convert_tiles
from .hopper_load import load_tiles


@gluon.jit
def _tiles(dtype: gl.constexpr, NUMBER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [NUMBER, ROWS, COLUMNS], layout)


@gluon.jit(do_not_specialize_on_alignment=["block_tables"], do_not_specialize=["window", "stride_table"])
def attend_tiles(q_desc, k_desc, v_desc, out_ptr, lse_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr, items, counts,
                 partial_out, partial_sums, block_tables, scale_log2, cap_log2, window, stride_table, stride_ot,
                 NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, NUM_KV_HEADS: gl.constexpr, PAIR: gl.constexpr,
                 PAGE: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
                 IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr, HAS_LSE: gl.constexpr,
                 HAS_SINKS: gl.constexpr, HAS_SCALES: gl.constexpr, RUN_BYTES: gl.constexpr):  # fmt: skip
    """One program for each multiprocessor; it sets up shared memory and lets its partitions run."""
    num_works = gl.load(counts)
    dtype: gl.constexpr = q_desc.dtype
    is_fp8: gl.constexpr = k_desc.dtype.primitive_bitwidth == 8
    LISTENERS: gl.constexpr = 3 if is_fp8 else 2
    BOX: gl.constexpr = PAGE if PAGE < 64 else 64
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_s, v_s = _tiles(dtype, STAGES, BLOCK_N, D), _tiles(dtype, STAGES, BLOCK_N, D)
    told_s = gl.allocate_shared_memory(gl.int32, [LISTENERS * 8, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    q_full, q_empty = make_barriers(LISTENERS, 1), make_barriers(LISTENERS, 1)
    k_full, v_full = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    k_empty, v_empty = make_barriers(STAGES, 2), make_barriers(STAGES, 2)
    bars = (q_full, q_empty, k_full, v_full, k_empty, v_empty)
    if is_fp8:
        k_raw, v_raw = _tiles(k_desc.dtype, 1, BLOCK_N, D), _tiles(k_desc.dtype, 1, BLOCK_N, D)
        raw_bars = (q_full, q_empty, make_barriers(1, 1), make_barriers(1, 1), make_barriers(1, 1), make_barriers(1, 1))
        gl.warp_specialize([
            (attend, (0, out_ptr, lse_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr, partial_out, partial_sums, bars,
                      told_s, q_s, k_s, v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS, NUM_KV_HEADS, PAIR,
                      BOX, BLOCK_N, D, STAGES, IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_LSE, HAS_SINKS, HAS_SCALES)),
            (attend, (1, out_ptr, lse_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr, partial_out, partial_sums, bars,
                      told_s, q_s, k_s, v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS, NUM_KV_HEADS, PAIR,
                      BOX, BLOCK_N, D, STAGES, IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_LSE, HAS_SINKS, HAS_SCALES)),
            (convert_tiles, (bars, raw_bars, told_s, k_raw, v_raw, k_s, v_s, BLOCK_N, STAGES)),
            (load_tiles, (q_desc, k_desc, v_desc, block_tables, items, num_works, counts + 2, raw_bars, told_s, q_s,
                          k_raw, v_raw, stride_table, NUM_HEADS, GROUP, NUM_KV_HEADS, PAIR, PAGE, BLOCK_N, D, 1,
                          LISTENERS, RUN_BYTES)),
        ], [4, 4, 1], [216, 56, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (attend, (0, out_ptr, lse_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr, partial_out, partial_sums, bars,
                      told_s, q_s, k_s, v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS, NUM_KV_HEADS, PAIR,
                      BOX, BLOCK_N, D, STAGES, IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_LSE, HAS_SINKS, HAS_SCALES)),
            (attend, (1, out_ptr, lse_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr, partial_out, partial_sums, bars,
                      told_s, q_s, k_s, v_s, scale_log2, cap_log2, window, stride_ot, NUM_HEADS, NUM_KV_HEADS, PAIR,
                      BOX, BLOCK_N, D, STAGES, IS_CAUSAL, HAS_WINDOW, HAS_CAP, HAS_LSE, HAS_SINKS, HAS_SCALES)),
            (load_tiles, (q_desc, k_desc, v_desc, block_tables, items, num_works, counts + 2, bars, told_s, q_s, k_s,
                          v_s, stride_table, NUM_HEADS, GROUP, NUM_KV_HEADS, PAIR, PAGE, BLOCK_N, D, STAGES,
                          LISTENERS, RUN_BYTES)),
        ], [4, 1], [240, 24])  # fmt: skip
