"""Device memory that somebody else owns, as a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def view_device(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """The bytes at `address`; nothing is copied, and the tensor owns nothing."""
    return torch.as_tensor(_DeviceBytes(address, num_bytes), device=device)


class _DeviceBytes:
    """Speaks the protocol by which torch takes over foreign device memory."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }
