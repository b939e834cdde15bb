"""How far a kernel may be from fp64, and the dtypes and device that kernel tests run with.

The interpreter is silently wrong for bf16, so bf16 runs only where kernels are compiled.
"""

import pytest
import torch
from torch import Tensor

TOLERANCES: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "elementwise": {
        torch.float32: (4e-6, 4e-6),
        torch.float16: (1e-3, 1e-4),
        torch.bfloat16: (8e-3, 1e-3),
    },
    "two roundings": {
        torch.float32: (8e-6, 8e-6),
        torch.float16: (2e-3, 1e-3),
        torch.bfloat16: (1.6e-2, 1e-2),
    },
    "rotation": {  # two rounded products of numbers up to about 10 may cancel
        torch.float32: (8e-6, 8e-6),
        torch.float16: (2e-3, 8e-3),
        torch.bfloat16: (1.6e-2, 6e-2),
    },
    "product": {
        torch.float32: (2e-5, 2e-5),
        torch.float16: (2e-3, 2e-3),
        torch.bfloat16: (1.6e-2, 1.6e-2),
    },
    "attention": {
        torch.float32: (1e-5, 1e-5),
        torch.float16: (2e-3, 2e-3),
        torch.bfloat16: (1.6e-2, 1.6e-2),
    },
    "mixture": {  # two products, with a rounded row between them
        torch.float32: (1e-5, 1e-5),
        torch.float16: (4e-3, 4e-3),
        torch.bfloat16: (3e-2, 3e-2),
    },
    "fp8 product": {  # Hopper's matrix units add fp8 products up in 14 bits
        torch.float32: (1e-5, 1e-5),
        torch.float16: (4e-3, 2e-2),
        torch.bfloat16: (3e-2, 3e-2),
    },
    "log-sum-exp": {
        torch.float32: (1e-4, 1e-4),  # of scores whose soft cap may be approximate
    },
}
"""By kind of operation and dtype of the result: (relative, absolute)."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

CPU_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
"""Of what runs in torch alone."""


def assert_near(actual: Tensor, expected: Tensor, kind: str) -> None:
    """Hold `actual` to the fp64 `expected` within the tolerance of its dtype."""
    rtol, atol = TOLERANCES[kind][actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)
