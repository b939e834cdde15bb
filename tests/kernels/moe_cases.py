"""Random mixtures of experts with experts that nobody chose and one that nearly all did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtensors.kernels.moe import moe_reference

from .tolerances import DEVICE


@dataclass(frozen=True, kw_only=True)
class MoeCase:
    x: Tensor
    gate_up: Tensor
    down: Tensor
    expert_ids: Tensor
    weights: Tensor

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.gate_up, self.down, self.expert_ids, self.weights

    def expected(self) -> Tensor:
        return moe_reference(
            self.x.double(), self.gate_up.double(), self.down.double(), self.expert_ids, self.weights.double()
        )


def make_case(
    num_rows: int,
    *,
    num_experts: int = 6,
    top_k: int = 3,
    hidden: int = 40,
    inner: int = 24,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
    row_stride: int | None = None,
) -> MoeCase:
    """Expert 0 is wanted by nine rows of ten, the last expert by none."""
    random = torch.Generator().manual_seed(num_rows)
    wish = torch.rand(num_rows, num_experts, generator=random)
    wish[:, 0] += 0.9
    wish[:, -1] -= 2.0
    ids = wish.topk(top_k).indices[:, torch.randperm(top_k, generator=random)].int().contiguous()
    x = torch.full((num_rows, row_stride or hidden), torch.nan)
    x[:, :hidden] = torch.randn(num_rows, hidden, generator=random)
    gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=random) * hidden**-0.5
    down = torch.randn(num_experts, hidden, inner, generator=random) * inner**-0.5
    return MoeCase(
        x=x.to(device, dtype)[:, :hidden],
        gate_up=gate_up.to(device, dtype),
        down=down.to(device, dtype),
        expert_ids=ids.to(device),
        weights=torch.rand(num_rows, top_k, generator=random).to(device),
    )
