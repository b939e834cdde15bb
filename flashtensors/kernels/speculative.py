"""Verifying drafts: which drafted tokens the target model would have drawn, and the token after them.

Two ways, both with exactly the target's distribution:

- `walk_drafts`, for drafts without probabilities (a greedy draft model, n-grams), as a chain or a tree. Sample after
  every node as without drafts, then follow the nodes that hold what was sampled. Draws depend on (seed, position)
  alone, so the text is the one without drafts, token for token.
- `verify_chain`, for drafts drawn from known probabilities q (Leviathan, Kalman, Matias 2023): accept v with
  probability `min(1, p_v / q_v)`; at the first rejection draw from `max(0, p - q)`, after the last draft from p.
  Here p is the target after temperature, top-k, top-p and min-p. It accepts more drafts, with other draws.

Shapes: S rows, N nodes, D drafts of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .arguments import check_logits, require
from .sampling import sample, uniform
from .sampling_rows import SamplingRows, token_probabilities

ACCEPT_STREAM = 0x5851F42D4C957F2D
"""Exclusive or'ed with a seed: uniforms that accept drafts, independent of those that draw tokens."""
RESIDUAL_STREAM = 0x14057B7EF767814F
"""The same for draws after a rejection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What becomes of every row's drafts."""

    num_accepted_S: Tensor
    """int32: drafts in front of the next token."""
    next_token_S: Tensor
    """int64: the token after them; 0 where invalid."""
    is_valid_S: Tensor
    """bool; False where the logits that decide are not finite numbers."""


def walk_drafts(
    sampled_SN: Tensor, draft_SN: Tensor, parents_SN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the drafts that were sampled, from the root.

    Args:
        sampled_SN: int64 tokens sampled after each node. Node 0 is the root: the last token that is certain.
        draft_SN: int64 token of each node; the root's is not read, and a negative one is no draft.
        parents_SN: int32 parent of each node, before the node itself; the root's is not read. None: a chain.

    Returns:
        int32 [S] number of accepted drafts; int64 [S] the token sampled after the last of them; int32 [S, N] the nodes
        passed, the root first, then -1. Of siblings that hold one token the first is taken.
    """
    shape, device = tuple(sampled_SN.shape), sampled_SN.device
    if sampled_SN.dim() != 2 or shape[1] == 0:
        raise ConfigError(f"sampled_SN is {list(shape)}, but it must be [rows, nodes] with the root of every row")
    require("sampled_SN", sampled_SN, torch.int64, shape, device)
    require("draft_SN", draft_SN, torch.int64, shape, device)
    if parents_SN is not None:
        require("parents_SN", parents_SN, torch.int32, shape, device)
    if not sampled_SN.is_cuda:
        return walk_drafts_reference(sampled_SN, draft_SN, parents_SN)
    from .speculative_kernel import launch_walk_drafts

    return launch_walk_drafts(sampled_SN, draft_SN, parents_SN)


def walk_drafts_reference(
    sampled_SN: Tensor, draft_SN: Tensor, parents_SN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`walk_drafts` one level of all rows at a time."""
    num_rows, num_nodes = sampled_SN.shape
    nodes_N = torch.arange(num_nodes, dtype=torch.int32, device=sampled_SN.device)
    parents_SN = (nodes_N - 1).expand(num_rows, -1) if parents_SN is None else parents_SN
    path_SN = torch.full((num_rows, num_nodes), -1, dtype=torch.int32, device=sampled_SN.device)
    path_SN[:, 0] = 0
    node_S1 = path_SN[:, :1].long()
    for depth in range(1, num_nodes):
        wanted_S1 = sampled_SN.gather(1, node_S1)
        is_child_SN = (parents_SN == node_S1) & (draft_SN == wanted_S1) & (draft_SN >= 0) & (nodes_N > node_S1)
        child_S1 = torch.where(is_child_SN, nodes_N, num_nodes).amin(1, keepdim=True)
        is_walking_S1 = (child_S1 < num_nodes) & (path_SN[:, depth - 1 : depth] >= 0)
        path_SN[:, depth : depth + 1] = child_S1.where(is_walking_S1, -1)
        node_S1 = child_S1.where(is_walking_S1, node_S1).long()
    num_accepted_S = (path_SN > 0).sum(1, dtype=torch.int32)
    return num_accepted_S, sampled_SN.gather(1, node_S1).squeeze(1), path_SN


def verify_chain(logits_SNV: Tensor, draft_SD: Tensor, draft_probs_SDV: Tensor, rows: SamplingRows) -> Verified:
    """Accept or reject a chain of drafts that were drawn from known probabilities.

    Args:
        logits_SNV: Target's logits after the last certain token and after each draft, `N = D + 1`; contiguous.
        draft_SD: int64 drafts; a negative one ends its row's chain.
        draft_probs_SDV: float32 probabilities that they were drawn from; contiguous.
        rows: Of S * N rows: those of one S have neighbouring positions, and else the same values.

    Raises:
        ConfigError: A tensor of another shape, dtype or device.
    """
    _check_chain(logits_SNV, draft_SD, draft_probs_SDV, rows)
    if not logits_SNV.is_cuda:
        return verify_chain_reference(logits_SNV, draft_SD, draft_probs_SDV, rows)
    from .speculative_kernel import launch_verify_chain

    return launch_verify_chain(logits_SNV, draft_SD, draft_probs_SDV, rows)


def verify_chain_reference(
    logits_SNV: Tensor, draft_SD: Tensor, draft_probs_SDV: Tensor, rows: SamplingRows
) -> Verified:
    """`verify_chain` by its definition."""
    num_rows, num_drafts = draft_SD.shape
    shape_SN, vocab_size = logits_SNV.shape[:2], logits_SNV.shape[-1]
    logits = logits_SNV.reshape(-1, vocab_size).float()
    sampled_SN, is_valid_SN = (x.view(shape_SN) for x in sample(logits, rows.to_draws(vocab_size)))
    target_SNV = token_probabilities(logits, rows).view(logits_SNV.shape)
    seed_SN, position_SN = rows.seed_S.view(shape_SN), rows.position_S.view(shape_SN)

    drafts_SD1 = draft_SD.clamp(min=0)[..., None]
    p_SD = target_SNV[:, :-1].gather(2, drafts_SD1).squeeze(2)
    q_SD = draft_probs_SDV.double().gather(2, drafts_SD1).squeeze(2)
    accept_SD = uniform(seed_SN ^ ACCEPT_STREAM, position_SN)[:, :-1] * q_SD < p_SD
    accept_SD &= (draft_SD >= 0) & is_valid_SN[:, :-1]
    num_accepted_S = accept_SD.int().cumprod(1).sum(1)
    row_S = torch.arange(num_rows, device=logits.device)
    draft_S = torch.cat((draft_SD, draft_SD.new_full((num_rows, 1), -1)), 1)[row_S, num_accepted_S]

    at_S = num_accepted_S.clamp(max=max(num_drafts - 1, 0))
    next_S = sampled_SN[row_S, num_accepted_S]
    if num_drafts:
        residual_SV = (target_SNV[row_S, num_accepted_S] - draft_probs_SDV[row_S, at_S].double()).clamp(min=0)
        cumulative_SV = residual_SV.cumsum(1)
        fraction_S = uniform(seed_SN ^ RESIDUAL_STREAM, position_SN)[row_S, num_accepted_S]
        target_S1 = (fraction_S * cumulative_SV[:, -1])[:, None]
        redrawn_S = torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(1).clamp(max=vocab_size - 1)
        # Rounding alone rejects when nothing is left; then the draft is as good.
        redrawn_S = redrawn_S.where(cumulative_SV[:, -1] > 0, draft_S)
        next_S = redrawn_S.where(draft_S >= 0, next_S)
    is_valid_S = is_valid_SN[row_S, num_accepted_S]
    return Verified(
        num_accepted_S=num_accepted_S.int(), next_token_S=next_S.where(is_valid_S, 0), is_valid_S=is_valid_S
    )


def _check_chain(logits_SNV: Tensor, draft_SD: Tensor, draft_probs_SDV: Tensor, rows: SamplingRows) -> None:
    if draft_SD.dim() != 2 or logits_SNV.dim() != 3:
        raise ConfigError(
            f"draft_SD is {list(draft_SD.shape)} and logits_SNV {list(logits_SNV.shape)}, but they must be "
            "[rows, drafts] and [rows, drafts + 1, vocabulary]"
        )
    (num_rows, num_drafts), vocab_size, device = draft_SD.shape, logits_SNV.shape[-1], logits_SNV.device
    require("logits_SNV", logits_SNV, logits_SNV.dtype, (num_rows, num_drafts + 1, vocab_size), device)
    check_logits(logits_SNV.flatten(0, 1))
    require("draft_SD", draft_SD, torch.int64, (num_rows, num_drafts), device)
    require("draft_probs_SDV", draft_probs_SDV, torch.float32, (num_rows, num_drafts, vocab_size), device)
    rows.check(num_rows * (num_drafts + 1), device)
