"""What doors ask of the arguments that they are called with; nothing waits for a device.

Shapes: S rows, V vocabulary, N pages, K key heads, P slots of a page, D head dim.
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


def check_cache(name: str, cache: Tensor) -> None:
    """Raise `ConfigError` unless `cache` is `[N, K, P, D]` with last stride 1."""
    if cache.dim() != 4 or cache.stride(-1) != 1:
        raise ConfigError(
            f"{name} is {list(cache.shape)} with strides {cache.stride()}, but it must be [num_pages, K, P, D] with "
            "last stride 1",
            param=name,
        )


def require_that(is_met: bool, name: str, got: object, allowed: str) -> None:
    """Raise `ConfigError` that names the argument unless the condition is met."""
    if not is_met:
        raise ConfigError(f"{name} is {got}, but it must be {allowed}", param=name)


def require(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise `ConfigError` unless `x` is contiguous with this dtype, shape and device."""
    if x.dtype != dtype or x.shape != shape or x.device != device or not x.is_contiguous():
        raise ConfigError(
            f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}, but it must be contiguous "
            f"{dtype} {list(shape)} on {device}",
            param=name,
        )
