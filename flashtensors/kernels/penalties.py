"""What changes logits before a token is chosen: addends and penalties.

For one row of logits `l`, in this order:

    l_v += addend_v                                          logit bias; -inf masks a token
    l_v  = l_v / r if l_v > 0 else l_v * r                   v in prompt or answer; r: repetition penalty (CTRL, 2019)
    l_v -= frequency * count_v + presence * [count_v > 0]    count_v: times that v is in the answer

Shapes: S rows that sample, R rows with penalties, V vocabulary, L tokens of the longest sequence, N addends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Addends:
    """What is added to single logits; entries for the same logit add up."""

    rows_N: Tensor
    token_ids_N: Tensor
    values_N: Tensor
    """float32; -inf takes the token out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Penalties of R rows, and the tokens they count. Factors are float32 [R]."""

    rows_R: Tensor
    token_ids_RL: Tensor
    """int32 or int64: prompt and answer; anything valid beyond `num_tokens_R`."""
    num_prompt_tokens_R: Tensor
    num_tokens_R: Tensor
    repetition_R: Tensor
    presence_R: Tensor
    frequency_R: Tensor
    token_rows_R: Tensor | None = None
    """Which rows of `token_ids_RL` these are, where it is a table of more; None: all, in order."""


def adjust_logits(logits_SV: Tensor, addends: Addends | None, penalties: Penalties | None) -> None:
    """Apply addends, then penalties, to float32 `logits_SV` in place."""
    if addends is not None:
        logits_SV.index_put_((addends.rows_N, addends.token_ids_N), addends.values_N, accumulate=True)
    if penalties is None:
        return
    if logits_SV.is_cuda:
        from .penalties_kernel import launch_penalise

        launch_penalise(logits_SV, penalties)
    else:
        logits_SV[penalties.rows_R] = _penalise(logits_SV[penalties.rows_R], penalties)


def _penalise(logits_RV: Tensor, penalties: Penalties) -> Tensor:
    """Penalised logits; only those of tokens that occur are touched, each with the same value at every occurrence."""
    token_ids_RL = penalties.token_ids_RL
    if penalties.token_rows_R is not None:
        token_ids_RL = token_ids_RL[penalties.token_rows_R, : int(penalties.num_tokens_R.max())]
    token_ids_RL = token_ids_RL.long()
    position_L = torch.arange(token_ids_RL.shape[1], device=logits_RV.device)
    last_R1 = penalties.num_tokens_R[:, None] - 1
    # Padding repeats the last token, whose new value is then merely written again.
    token_ids_RL = token_ids_RL.gather(1, position_L.minimum(last_R1))
    is_answer_RL = (position_L >= penalties.num_prompt_tokens_R[:, None]) & (position_L <= last_R1)
    count_RV = torch.zeros_like(logits_RV).scatter_add_(1, token_ids_RL, is_answer_RL.to(logits_RV.dtype))
    count_RL = count_RV.gather(1, token_ids_RL)
    value_RL = logits_RV.gather(1, token_ids_RL)
    repetition_R1 = penalties.repetition_R[:, None]
    value_RL = torch.where(value_RL > 0, value_RL / repetition_R1, value_RL * repetition_R1)
    value_RL -= penalties.frequency_R[:, None] * count_RL + penalties.presence_R[:, None] * (count_RL > 0)
    return logits_RV.scatter(1, token_ids_RL, value_RL)
