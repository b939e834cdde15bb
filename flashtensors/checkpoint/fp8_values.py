"""Rounding of weights to fp8 (e4m3) with a scale for each row, in numpy.

    scale_o = max_i |w_oi| / 448        v_oi = round(w_oi / scale_o), to nearest, ties to even

e4m3: 1 sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinities, 448 the largest (Micikevicius et al., 2022).

Shapes: O rows, I columns.
"""

from __future__ import annotations

import numpy as np

_MAX = 448.0
_MIN_SCALE = np.float32(2.0**-120)
"""For rows of zeros; far enough from the smallest fp32 that nothing scaled by it overflows."""
_BITS = {"F32": np.dtype("<u4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<u2")}
FLOAT_DTYPES = tuple(_BITS)
"""Dtypes that are rounded, as safetensors spells them."""


def bits_dtype(dtype: str) -> np.dtype:
    """The unsigned integers in which the elements of `dtype` are read."""
    return _BITS[dtype]


def row_scales(bits_OI: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 `[O]`; infinite or no number where a row has such a value."""
    # Floats of one sign are in the order of their bits.
    largest_O = (bits_OI & bits_OI.dtype.type(2 ** (bits_OI.itemsize * 8 - 1) - 1)).max(axis=1, initial=0)
    return np.maximum(as_float32(largest_O, dtype) / np.float32(_MAX), _MIN_SCALE)


def quantize_rows(bits_OI: np.ndarray, dtype: str, scales_O: np.ndarray) -> np.ndarray:
    """The values as e4m3, uint8 `[O, I]`."""
    return round_to_e4m3(as_float32(bits_OI, dtype) / scales_O[:, None])


def as_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Floats of any dtype, exactly."""
    if dtype == "F32":
        return bits.view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else (bits.astype("<u4") << 16).view(np.float32)


def round_to_e4m3(values: np.ndarray) -> np.ndarray:
    """fp32 of at most 464 in magnitude, to the nearest e4m3 as its 8 bits."""
    bits = values.view(np.uint32)
    sign = (bits >> 24).astype(np.uint8) & np.uint8(0x80)
    bits = bits & np.uint32(0x7FFFFFFF)
    small = np.rint(bits.view(np.float32) * np.float32(2**9)).astype(np.uint8)  # 2^-9: the least value above 0
    is_small = bits < np.uint32((127 - 6) << 23)  # below 2^-6, the least with a full mantissa
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20) - np.uint32((127 - 7) << 3)
    return np.where(is_small, small, normal.astype(np.uint8)) | sign
