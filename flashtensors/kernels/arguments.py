"""What doors ask of the tensors that they are called with; nothing waits for a device.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError

_LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_logits(logits_SV: Tensor) -> None:
    """Raise `ConfigError` for logits that kernels could not read."""
    if logits_SV.dim() != 2 or logits_SV.dtype not in _LOGIT_DTYPES or logits_SV.shape[1] == 0:
        raise ConfigError(
            f"logits are {logits_SV.dtype} {list(logits_SV.shape)}, but they must be float32, float16 or bfloat16 "
            "[rows, vocabulary] with at least one token"
        )
    if logits_SV.stride(1) != 1:
        raise ConfigError(f"logits have strides {logits_SV.stride()}, but the last must be 1: call contiguous() first")


def require(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise `ConfigError` unless `x` is contiguous with this dtype, shape and device."""
    if x.dtype != dtype or x.shape != shape or x.device != device or not x.is_contiguous():
        raise ConfigError(
            f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}, but it must be contiguous "
            f"{dtype} {list(shape)} on {device}",
            param=name,
        )
