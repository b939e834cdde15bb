"""Draws from logits that single sequences want changed or looked at: penalties, biases, masked stop tokens, logprobs.

That takes float32, and vocabularies are large: 256 rows of 152k tokens are 156 MB. So rows go through in parts,
which bounds what a step needs whatever its size.

Shapes: S spans, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.penalties import adjust_logits
from ..kernels.sampling_rows import SamplingRows
from ..request import TokenLogprobs
from .logprobs import PendingLogprobs, queue_logprobs
from .slots import SlotTable

PART_ROWS = 256
"""Rows that are float32 at a time."""


def draw_changed(
    spans_S4: np.ndarray, table: SlotTable, logits_SV: Tensor, sampling: SamplingRows
) -> tuple[Tensor, Tensor, list[PendingLogprobs]]:
    """Queue the draws of a step, and the logprobs that its sequences want.

    Args:
        spans_S4: As in a plan.
        table: What the slots want.
        logits_SV: As the model left them; not changed.
        sampling: How each row draws; there may be more than S.

    Returns:
        int64 [S] tokens, bool [S] whether their logits were finite, and logprobs on their way.
    """
    from ..kernels.sampling_launch import launch_sample

    slots_S, starts_S, num_tokens_S, samples_S = spans_S4.astype(np.int64).T
    positions_S, drawn, pending = starts_S + num_tokens_S, [], []
    for begin in range(0, len(spans_S4), PART_ROWS):
        part = slice(begin, min(begin + PART_ROWS, len(spans_S4)))
        slots_P, positions_P = slots_S[part], positions_S[part]
        logits_PV = logits_SV[part].float()
        adjust_logits(logits_PV, table.addends(slots_P, positions_P), table.penalties(slots_P, positions_P))
        drawn.append(launch_sample(logits_PV, sampling.part(part.start, part.stop), has_nuclei=True))
        wanted = [row for row in table.wanted_logprobs(slots_P) if samples_S[begin + row[0]]]
        pending.append(queue_logprobs(wanted, logits_PV, drawn[-1].token_ids_S))
    token_ids_S = torch.cat([part.token_ids_S for part in drawn])
    is_valid_S = torch.cat([part.is_valid_S for part in drawn])
    return token_ids_S, is_valid_S, [each for each in pending if each is not None]


def unpack_logprobs(pending: Sequence[PendingLogprobs]) -> dict[int, TokenLogprobs]:
    """By slot; the step has arrived."""
    return {slot: logprobs for each in pending for slot, logprobs in each.unpack().items()}
