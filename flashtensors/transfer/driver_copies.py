"""Many copies from page-locked memory to a CUDA device in one call of the driver.

A model of many experts has 19,000 extents. Each copy that is queued by itself costs the link a pause, and a place in a
queue of about 1,000; a batch costs one.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html, cuMemcpyBatchAsync
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from ..errors import TransferError

_FIRST_VERSION = 12080
"""Of the driver that has batches: CUDA 12.8."""


class DriverCopies:
    """Queues batches of copies on the current stream of a device, which is not the default one.

    Args:
        device: A CUDA device.
        driver: `cuda.bindings.driver`.
    """

    def __init__(self, device: torch.device, driver: ModuleType) -> None:
        self._device = device
        self._driver = driver
        self._attributes = driver.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: list[int]) -> None:
        """Queue copies between addresses, of so many bytes each, in no order among themselves.

        Raises:
            TransferError: The driver refuses.
        """
        driver, count = self._driver, len(sizes)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        result, *_ = driver.cuMemcpyBatchAsync(
            [driver.CUdeviceptr(address) for address in targets],
            [driver.CUdeviceptr(address) for address in sources],
            sizes,
            count,
            [self._attributes],
            [0],
            1,
            stream,
        )
        if result != driver.CUresult.CUDA_SUCCESS:
            raise TransferError(f"cuMemcpyBatchAsync of {count} copies to {self._device} failed: {result.name}")


def find_driver_copies(device: torch.device) -> DriverCopies | None:
    """The quick way to `device`; None where there is none, and torch copies."""
    if device.type != "cuda":
        return None
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None
    result, version = driver.cuDriverGetVersion()
    has_batches = result == driver.CUresult.CUDA_SUCCESS and version >= _FIRST_VERSION
    return DriverCopies(device, driver) if has_batches and hasattr(driver, "cuMemcpyBatchAsync") else None
