"""What kernels ask of the device that they are launched on; asked of the driver once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`: a GPU, or a CPU where its interpreter is on (`TRITON_INTERPRET=1`)."""
    if device.type != "cpu":
        return device.type == "cuda"
    try:
        from triton import knobs
    except ImportError:
        return False
    return knobs.runtime.interpret


@functools.cache
def has_early_start(device: torch.device) -> bool:
    """Whether `device` has programmatic dependent launch: Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether `device` is a GPU that multiplies fp8: Ada, Hopper and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether `device` runs what was written for Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device, *, interpreted: int = 1) -> int:
    """Multiprocessors of a GPU; `interpreted` of a CPU, where kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
