"""The device a worker computes on, and how much of its memory models may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import Settings
from ..errors import ConfigError
from .host_memory import available_host_bytes

DEVICE_MARGIN_BYTES = 512 * 1024**2
"""Device memory left alone for activations and workspaces when others already use most of it."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device and its budget."""

    name: str
    """`cpu` or `cuda:N`."""
    description: str
    """For people, for example `NVIDIA H200`."""
    budget_bytes: int
    """Memory that weights and KV caches may take together."""

    @property
    def is_cpu(self) -> bool:
        """Whether models run in host memory."""
        return self.name == "cpu"


def open_device(settings: Settings) -> Device:
    """The device that `settings.device` names.

    The budget on a GPU is `gpu_memory_utilization` of its memory, or what is free now less a margin where that is
    less. On a CPU it is `mem_pool_size`, or `gpu_memory_utilization` of the memory that is available now; nothing is
    taken before a model needs it.

    Raises:
        ConfigError: A CUDA device that is not there.
    """
    index = find_cuda_index(settings)
    if index is None:
        return _open_cpu(settings)
    torch.cuda.set_device(index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    budget_bytes = min(int(total_bytes * settings.gpu_memory_utilization), free_bytes - DEVICE_MARGIN_BYTES)
    return Device(
        name=f"cuda:{index}", description=torch.cuda.get_device_name(index), budget_bytes=max(0, budget_bytes)
    )


def find_cuda_index(settings: Settings) -> int | None:
    """Which CUDA device `settings.device` names; None: the CPU. Raises `ConfigError` for one that is not there."""
    has_cuda = torch.cuda.is_available()
    wanted = settings.device
    if wanted == "cpu" or (wanted == "auto" and not has_cuda):
        return None
    index = int(wanted.partition(":")[2] or 0)
    num_devices = torch.cuda.device_count() if has_cuda else 0
    if index >= num_devices:
        raise ConfigError(
            f"device is {wanted!r}, but torch {torch.__version__} sees {num_devices} CUDA devices; "
            "choose one of them, cpu or auto",
            param="device",
        )
    return index


def _open_cpu(settings: Settings) -> Device:
    available_bytes = available_host_bytes()
    share = int(available_bytes * settings.gpu_memory_utilization)
    budget_bytes = share if settings.mem_pool_size is None else min(settings.mem_pool_size, available_bytes)
    return Device(name="cpu", description=f"CPU, {torch.get_num_threads()} threads", budget_bytes=budget_bytes)
