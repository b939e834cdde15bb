"""The converting warpgroup of the Hopper kernel: fp8 tiles as they were loaded become tiles of the queries' dtype.

Every e4m3 number is one of bf16 and of fp16, so nothing is lost; factors of the cache go to scores and outputs.
"""

# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper_load import hear


@gluon.jit
def _widen(x, dtype: gl.constexpr):
    """e4m3 as `dtype`. No instruction makes bf16 of it: sign and body are shifted to their places and scaled by 2^120,
    which is exact, but NaN becomes 480.
    """
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, scale;
            mov.b32 scale, 0x7B807B80;
            prmt.b32 low, $2, $2, 0x9180;
            prmt.b32 high, $2, $2, 0xB3A2;
            shl.b32 low, low, 4;
            shl.b32 high, high, 4;
            and.b32 low, low, 0x87F087F0;
            and.b32 high, high, 0x87F087F0;
            mul.bf16x2 $0, low, scale;
            mul.bf16x2 $1, high, scale;
            }""",
            "=r,=r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    return x.to(dtype)


@gluon.jit
def _convert(raw, raw_full, raw_empty, tile, full, empty, raw_phase, phase):
    threads: gl.constexpr = raw.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    mbarrier.wait(raw_full, raw_phase)
    x = raw.load(layout)
    mbarrier.arrive(raw_empty, count=1)
    mbarrier.wait(empty, phase)
    tile.store(_widen(x, tile.dtype))
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def convert_tiles(bars, raw_bars, told_s, k_raw, v_raw, k_s, v_s, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Convert the tiles of every item, in the order in which they are loaded."""
    k_full, v_full, k_empty, v_empty = bars[2], bars[3], bars[4], bars[5]
    q_full, q_empty, k_raw_full, v_raw_full, k_raw_empty, v_raw_empty = raw_bars
    turn = 0
    num_tiles = 0
    mbarrier.wait(q_full.index(2), 0)
    while hear(told_s, 2, 0) >= 0:
        keys = hear(told_s, 2, 5) - hear(told_s, 2, 4)
        mbarrier.arrive(q_empty.index(2), count=1)
        for _block in range((keys + BLOCK_N - 1) // BLOCK_N):
            s = turn % STAGES
            phase = ((turn // STAGES) & 1) ^ 1
            _convert(k_raw.index(0), k_raw_full.index(0), k_raw_empty.index(0), k_s.index(s), k_full.index(s),
                     k_empty.index(s), turn & 1, phase)  # fmt: skip
            _convert(v_raw.index(0), v_raw_full.index(0), v_raw_empty.index(0), v_s.index(s), v_full.index(s),
                     v_empty.index(s), turn & 1, phase)  # fmt: skip
            turn += 1
        num_tiles += 1
        mbarrier.wait(q_full.index(2), num_tiles & 1)
