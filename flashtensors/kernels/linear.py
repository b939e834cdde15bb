"""y = x Wᵀ + b.

On a CPU, oneDNN multiplies twice as fast with weights in its own blocked layout: the 120 projections of a
135M-parameter Llama at 1 / 8 / 16 rows take 10 / 10 / 13 ms packed against 17 / 21 / 25 ms plain in bf16, and
18 / 19 / 25 against 31 / 46 / 55 ms in fp32 (2 Zen 4 cores). `pack_weight` makes that layout once, at load; it is
the same for every number of rows. Elsewhere weights stay as they are and nothing is copied.

On Hopper, a product of few rows streams its weight at nearly the rate of a copy (`linear_kernel.py`), from the moment
the kernel in front is about to end; `linear_tiling.py` says which products that is, and cuBLAS computes the others.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .device_traits import runs_gluon
from .linear_tiling import LEAST_ELEMENTS, MOST_ROWS

_PACKING_ROWS = 16
"""Rows that the packed layout is chosen for; from 8 on, oneDNN chooses one that is best from 1 to 512 rows."""


def pack_weight(weight_OI: Tensor) -> Tensor:
    """The weight as `linear` wants it: a packed copy where that is quicker, else `weight_OI` itself."""
    if weight_OI.device.type != "cpu" or not _can_pack(weight_OI.dtype):
        return weight_OI
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKING_ROWS)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`[T, O]`; the weight comes from `pack_weight`.

    On a GPU, what writes the weight must have ended before the kernel in front of this product begins: weights are read
    early. The sum of a row never depends on what other rows hold, nor on their number up to `MOST_ROWS`.
    CUDA graphs that hold products have to replay one after another: they share where parts of sums meet.
    """
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    if weight_OI.is_cuda and _has_few_rows(x_TI, weight_OI) and runs_gluon(weight_OI.device):
        from .linear_hopper import can_launch, launch_linear

        if can_launch(x_TI, weight_OI, bias_O):
            return launch_linear(x_TI, weight_OI, bias_O)
    return linear_reference(x_TI, weight_OI, bias_O)


def _has_few_rows(x_TI: Tensor, weight_OI: Tensor) -> bool:
    return x_TI.dim() == 2 and 1 <= x_TI.shape[0] <= MOST_ROWS and weight_OI.numel() >= LEAST_ELEMENTS


def linear_reference(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`linear` for a plain weight."""
    return F.linear(x_TI, weight_OI, bias_O)
