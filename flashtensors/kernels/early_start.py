"""Which devices can place a kernel's programs before the kernel in front of it has ended."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_early_start(device: torch.device) -> bool:
    """Whether `device` has programmatic dependent launch: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
