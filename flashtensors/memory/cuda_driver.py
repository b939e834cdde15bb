"""CUDA's virtual memory management: address ranges that keep their place while the memory behind them changes.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""
# pyright: reportAttributeAccessIssue=false
# (cuda-bindings is compiled, and has no stubs)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable, CapacityError, FlashError, TransferError
from .device_view import view_device


class CudaMemoryDriver:
    """Physical memory and addresses of one CUDA device, through `cuda-bindings`.

    Args:
        device: A CUDA device; its context is made if it is not there yet.

    Raises:
        BackendUnavailable: `cuda-bindings` is not installed.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise BackendUnavailable(
                "weights on a GPU are remapped through the package cuda-bindings, which is not installed; "
                "pip install cuda-bindings"
            ) from error
        index = torch.device(device).index
        self.device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        torch.zeros(1, device=self.device)  # makes the device's primary context
        self._driver = driver
        self._location = driver.CUmemLocation()
        self._location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = self.device.index
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = self._location
        flags = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity_bytes = int(self._call("cuMemGetAllocationGranularity", self._properties, flags))

    def create(self, num_bytes: int) -> int:
        """Physical memory, a multiple of `granularity_bytes`; raises `CapacityError` when the device has none."""
        with torch.cuda.device(self.device):
            return int(self._call("cuMemCreate", num_bytes, self._properties, 0))

    def release(self, handle: int) -> None:
        """Give physical memory back once it is mapped nowhere."""
        with torch.cuda.device(self.device):
            self._call("cuMemRelease", handle)

    def reserve(self, num_bytes: int) -> int:
        """An address range with no memory behind it."""
        with torch.cuda.device(self.device):
            return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """Give an address range back; nothing is mapped there."""
        with torch.cuda.device(self.device):
            self._call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, handles: list[int], handle_bytes: int) -> None:
        """Put handles behind the range that begins at `address`, one after another, for reading and writing."""
        access = self._driver.CUmemAccessDesc()
        access.location = self._location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        num_mapped = 0
        with torch.cuda.device(self.device):
            try:
                for handle in handles:
                    self._call("cuMemMap", address + num_mapped * handle_bytes, handle_bytes, 0, handle, 0)
                    num_mapped += 1
                self._call("cuMemSetAccess", address, len(handles) * handle_bytes, [access], 1)
            except FlashError:
                self.unmap(address, num_mapped, handle_bytes)
                raise

    def unmap(self, address: int, num_handles: int, handle_bytes: int) -> None:
        """Take the memory away from behind a range; no kernel or copy uses it any more."""
        with torch.cuda.device(self.device):
            for index in range(num_handles):
                self._call("cuMemUnmap", address + index * handle_bytes, handle_bytes)

    def tensor(self, address: int, num_bytes: int) -> Tensor:
        """Mapped addresses as bytes; nothing is copied, and the tensor owns nothing."""
        return view_device(address, num_bytes, self.device)

    def _call(self, name: str, *arguments: object) -> Any:
        result, *values = getattr(self._driver, name)(*arguments)
        if result == self._driver.CUresult.CUDA_SUCCESS:
            return values[0] if values else None
        message = f"{name} on {self.device} failed: {result.name}"
        if result == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise CapacityError(f"{message}; unload a model, or leave the device to this process alone")
        raise TransferError(message)
