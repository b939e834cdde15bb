"""Which experts a row goes to, and with what weight, from its router's logits.

    scores      s = softmax(logits) or sigmoid(logits), in fp32
    choice      c = s + bias; in the kept groups the k largest are chosen, of equals the lower id
    weights     w = s of the chosen; divided by their sum where renormalised; times a scale

Groups (DeepSeek-V2 and V3, 2024): experts lie in groups of neighbours; a group's score is the sum of its 1 (V2) or 2
(V3) largest choices, and only experts of the best groups can be chosen.

Shapes: T rows, X experts, G groups, k experts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .arguments import require


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How logits become experts and weights."""

    num_experts_per_token: int
    is_sigmoid: bool = False
    """Scores are sigmoids; otherwise a softmax over all experts."""
    renormalise: bool = True
    """Weights of a row sum to `scale`."""
    scale: float = 1.0
    num_groups: int = 1
    num_groups_kept: int = 1
    experts_per_group_score: int = 1
    """How many of a group's largest choices add up to its score: 1 or 2."""

    def check(self, num_experts: int) -> None:
        """Raise `ConfigError` unless `num_experts` can be routed so."""
        if not 0 < self.num_groups_kept <= self.num_groups or num_experts % self.num_groups:
            raise ConfigError(
                f"routing keeps {self.num_groups_kept} of {self.num_groups} groups of {num_experts} experts, but "
                "groups must be of one size and no more can be kept than there are"
            )
        group_size = num_experts // self.num_groups
        if not 0 < self.num_experts_per_token <= group_size * self.num_groups_kept:
            raise ConfigError(
                f"routing chooses {self.num_experts_per_token} experts of the {group_size * self.num_groups_kept} in "
                "the groups that it keeps"
            )
        if not 0 < self.experts_per_group_score <= min(2, group_size):
            raise ConfigError(
                f"a group of {group_size} experts is scored by {self.experts_per_group_score} of them; 1 or 2 are "
                "allowed"
            )


def route(logits_TX: Tensor, routing: Routing, *, bias_X: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Experts `[T, k]` int32, distinct in a row, best first, and their weights `[T, k]` fp32.

    A row whose logits are not numbers gets valid experts and weights that are not numbers.

    Args:
        logits_TX: Any floating dtype, last stride 1.
        routing: See there.
        bias_X: fp32, contiguous, added to scores for the choice alone. Of a kept group, experts at -inf are chosen
            where no others are left.

    Raises:
        ConfigError: Shapes that do not fit each other, or a bias that kernels could not read.
    """
    if logits_TX.dim() != 2:
        raise ConfigError(f"logits are {list(logits_TX.shape)}, but they must be [T, X]")
    routing.check(logits_TX.shape[1])
    if bias_X is not None:
        require("bias_X", bias_X, torch.float32, tuple(logits_TX.shape[1:]), logits_TX.device)
    if logits_TX.is_cuda:
        from .moe_routing_kernel import launch_route

        return launch_route(logits_TX, routing, bias_X)
    return route_reference(logits_TX, routing, bias_X=bias_X)


def route_reference(logits_TX: Tensor, routing: Routing, *, bias_X: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`route` by its definition."""
    logits_TX = logits_TX if logits_TX.dtype == torch.float64 else logits_TX.float()
    scores_TX = torch.sigmoid(logits_TX) if routing.is_sigmoid else torch.softmax(logits_TX, dim=-1)
    choice_TX = scores_TX if bias_X is None else scores_TX + bias_X
    choice_TX = choice_TX.masked_fill(choice_TX.isnan(), float("-inf"))
    order_TX = torch.sort(choice_TX, dim=-1, descending=True, stable=True).indices
    if routing.num_groups > 1:
        is_kept_TX = _experts_of_kept_groups(choice_TX, routing).gather(1, order_TX)
        order_TX = order_TX.gather(1, is_kept_TX.byte().sort(dim=-1, descending=True, stable=True).indices)
    ids_Tk = order_TX[:, : routing.num_experts_per_token]
    weights_Tk = scores_TX.gather(1, ids_Tk)
    if routing.renormalise:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + 1e-20)
    return ids_Tk.int(), (weights_Tk * routing.scale).float()


def _experts_of_kept_groups(choice_TX: Tensor, routing: Routing) -> Tensor:
    choice_TGX = choice_TX.unflatten(1, (routing.num_groups, -1))
    group_scores_TG = choice_TGX.topk(routing.experts_per_group_score, dim=-1).values.sum(-1)
    order_TG = torch.sort(group_scores_TG, dim=-1, descending=True, stable=True).indices
    is_kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    is_kept_TG.scatter_(1, order_TG[:, : routing.num_groups_kept], True)
    return is_kept_TG[..., None].expand_as(choice_TGX).flatten(1)
