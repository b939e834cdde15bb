"""What kernels ask of the device that they are launched on; asked of the driver once."""

from __future__ import annotations

import functools
import importlib
import logging

import torch

_log = logging.getLogger(__name__)

GLUON_VERSIONS = ((3, 6), (3, 9))
"""The first and the last Triton whose Gluon tests hold the kernels for Hopper to."""

_NO_BOUND = 1 << 40

_GLUON_MODULES = ("linear_hopper", "attention.hopper", "attention.hopper_decode")


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
def runs_gluon(device: torch.device) -> bool:
    """Whether `device` runs what is written in Gluon for Hopper; plain Triton computes the same elsewhere."""
    return is_hopper(device) and has_gluon()


@functools.cache
def has_gluon() -> bool:
    """Whether the installed Triton has Gluon as it is known here: it is experimental, and its names change."""
    import triton

    first, last = GLUON_VERSIONS
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    try:
        if not first <= version <= last:
            raise ImportError("its Gluon has not been tried")
        for name in _GLUON_MODULES:
            importlib.import_module(f".{name}", __package__)
    except (ImportError, AttributeError) as error:
        _log.warning(
            "slower kernels are used than a Hopper GPU could run, for Triton %s: %s; install Triton %d.%d to %d.%d",
            triton.__version__, error, *first, *last,
        )  # fmt: skip
        return False
    return True


@functools.cache
def num_multiprocessors(device: torch.device, *, interpreted: int = 1) -> int:
    """Multiprocessors of a GPU; `interpreted` of a CPU, where kernels run in Triton's interpreter."""
    if device.type != "cuda":
        return interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """Shared memory that a program may have on a GPU; a CPU sets no bound, nor a driver that does not tell."""
    if device.type != "cuda":
        return _NO_BOUND
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _NO_BOUND)
