"""Page-locking of host memory, without which the device cannot fetch it at the link's speed."""

from __future__ import annotations

from typing import Protocol

import torch

from ..errors import TransferError


class Pinning(Protocol):
    """Locks and unlocks ranges of host memory; called from several threads at once."""

    def register(self, address: int, num_bytes: int) -> None:
        """Lock a range; raises `TransferError` where the system refuses."""
        ...

    def unregister(self, address: int) -> None:
        """Unlock the range that was registered at `address`."""
        ...


class CudaPinning:
    """Registers ranges with CUDA, for copies to and from every device of the process.

    Args:
        device: The device whose context does it.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)

    def register(self, address: int, num_bytes: int) -> None:
        """Lock a range; raises `TransferError` where CUDA refuses."""
        self._call("cudaHostRegister", address, num_bytes, 0)

    def unregister(self, address: int) -> None:
        """Unlock the range that was registered at `address`."""
        self._call("cudaHostUnregister", address)

    def _call(self, name: str, *arguments: int) -> None:
        with torch.cuda.device(self._device):
            result = int(getattr(torch.cuda.cudart(), name)(*arguments))
        if result != 0:
            raise TransferError(f"{name}{arguments} on {self._device} failed with CUDA error {result}")


def find_pinning(device: torch.device | str) -> Pinning | None:
    """What locks memory for copies to `device`; None where there is nothing to copy to."""
    return CudaPinning(device) if torch.device(device).type == "cuda" else None
