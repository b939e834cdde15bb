"""Keys and values of fp8 caches, two neighbours of a row at a time, for kernels that multiply in fp16.

An int16 of the cache holds an even and an odd dim of one key. As such they are moved in the layouts of 16-bit matrix
units, which have no way to turn a tile of bytes, and become an fp16 tile of even dims and one of odd dims; every number
of e4m3 is exact in fp16. Products over dims are added up over both, and outputs are put together at the end.

One byte at a time, and through bf16, 256 sequences of Qwen3-0.6B decoded more slowly from an fp8 cache than from a bf16
one on an H200 (`bench256`: 23,800 tokens a second and 26,700); in pairs they make 34,400.
"""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen_pairs(pairs, HAS_CONVERSION: tl.constexpr):
    """fp16 tiles of the even and the odd dims of int16 `pairs`.

    Args:
        HAS_CONVERSION: Whether the device converts e4m3 itself. Else bits are moved, and NaN becomes 480.
    """
    if HAS_CONVERSION:
        even, odd = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.f16x2.e4m3x2 both, $2; mov.b32 {$0, $1}, both; }",
            "=h,=h,h",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
        return even, odd
    # exponents and mantissas as they are, 7 less in bias than fp16's 15
    even = ((pairs & 0x80) << 8) | ((pairs & 0x7F) << 7)
    odd = (pairs & -0x8000) | ((pairs >> 1) & 0x3F80)
    return even.to(tl.float16, bitcast=True) * 256.0, odd.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def split_dims(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """fp16 tiles of the even and the odd dims of queries [HEIGHT, WIDTH], held within what fp16 can be."""
    bounded = tl.minimum(tl.maximum(x.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    return tl.split(bounded.reshape(HEIGHT, WIDTH // 2, 2))
