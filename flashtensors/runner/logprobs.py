"""Logprobs of the tokens of a step, on their way from the device to the answer.

Shapes: R rows that sample, Q of them that want logprobs, V vocabulary, K alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.sampling import token_logprobs
from ..request import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingLogprobs:
    """Logprobs of some rows; from a device, in pinned memory and not before the step has arrived."""

    slots: list[int]
    num_top: list[int]
    chosen_Q: Tensor
    top_ids_QK: Tensor
    top_QK: Tensor

    def unpack(self) -> dict[int, TokenLogprobs]:
        """By slot; the step has arrived."""
        chosen, top_ids, top = self.chosen_Q.tolist(), self.top_ids_QK.tolist(), self.top_QK.tolist()
        return {
            slot: TokenLogprobs(chosen[i], list(zip(top_ids[i][:num_top], top[i][:num_top], strict=True)))
            for i, (slot, num_top) in enumerate(zip(self.slots, self.num_top, strict=True))
        }


def queue_logprobs(
    wanted: Sequence[tuple[int, int, int]], logits_RV: Tensor, token_ids_R: Tensor
) -> PendingLogprobs | None:
    """Compute logprobs and send them to the host, without waiting; None where nobody wants any.

    Args:
        wanted: Row, slot, and number of alternatives of each row that wants them.
        logits_RV: After bias and penalties.
        token_ids_R: What was drawn.
    """
    if not wanted:
        return None
    rows, slots, num_top = (list(column) for column in zip(*wanted, strict=True))
    rows_Q = torch.tensor(rows).to(logits_RV.device, non_blocking=True)
    most = min(max(num_top), logits_RV.shape[1])
    tensors = token_logprobs(logits_RV[rows_Q], token_ids_R[rows_Q], most)
    chosen_Q, top_ids_QK, top_QK = (tensor.to("cpu", non_blocking=True) for tensor in tensors)
    return PendingLogprobs(slots=slots, num_top=num_top, chosen_Q=chosen_Q, top_ids_QK=top_ids_QK, top_QK=top_QK)
