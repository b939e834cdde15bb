"""What changes logits before a token is chosen: addends and penalties.

For one row of logits `l`, in this order:

    l_v += addend_v                                          logit bias; -inf masks a token
    l_v  = l_v / r if l_v > 0 else l_v * r                   v in prompt or answer; r: repetition penalty (CTRL, 2019)
    l_v -= frequency * count_v + presence * [count_v > 0]    count_v: times that v is in the answer

`add_bias` and `penalise` take parameters on the device and change logits in place; on a GPU neither waits for it.
`adjust_logits` is for bias that the host lists token by token.

Shapes: S rows that sample, R rows with penalties, V vocabulary, L tokens of the longest sequence, N addends of all rows
or of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .arguments import check_logits, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Addends:
    """What is added to single logits; entries for the same logit add up."""

    rows_N: Tensor
    token_ids_N: Tensor
    values_N: Tensor
    """float32; -inf takes the token out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Penalties of R rows, and the tokens they count; contiguous tensors of one device, last stride 1 is enough for
    `token_ids_RL`. Values are not looked at before they are used.
    """

    rows_R: Tensor
    """int64 [R]: their rows of the logits, each once."""
    token_ids_RL: Tensor
    """int32 or int64: prompt and answer; anything valid beyond `num_tokens_R`."""
    num_prompt_tokens_R: Tensor
    """int64 [R]."""
    num_tokens_R: Tensor
    """int64 [R]: of prompt and answer; a row of 0 stays as it is."""
    repetition_R: Tensor
    """float32 [R], above 0; 1 is none."""
    presence_R: Tensor
    """float32 [R]; 0 is none."""
    frequency_R: Tensor
    """float32 [R]; 0 is none."""
    token_rows_R: Tensor | None = None
    """int64 [R]: which rows of `token_ids_RL` these are, where it is a table of more; None: all, in order."""

    def check(self, device: torch.device) -> None:
        """Raise `ConfigError` for the first tensor that kernels could not read."""
        shape = (len(self.rows_R),)
        for name in ("rows_R", "num_prompt_tokens_R", "num_tokens_R"):
            require(f"penalties.{name}", getattr(self, name), torch.int64, shape, device)
        for name in ("repetition_R", "presence_R", "frequency_R"):
            require(f"penalties.{name}", getattr(self, name), torch.float32, shape, device)
        if self.token_rows_R is not None:
            require("penalties.token_rows_R", self.token_rows_R, torch.int64, shape, device)
        token_ids, is_table = self.token_ids_RL, self.token_rows_R is not None
        is_readable = token_ids.dtype in (torch.int32, torch.int64) and token_ids.device == device
        if not is_readable or token_ids.dim() != 2 or token_ids.stride(1) != 1:
            raise ConfigError(
                f"penalties.token_ids_RL is {token_ids.dtype} {list(token_ids.shape)} with strides "
                f"{token_ids.stride()} on {token_ids.device}, but it must be int32 or int64 [rows, tokens] with last "
                f"stride 1 on {device}"
            )
        if not is_table and len(token_ids) != shape[0]:
            raise ConfigError(
                f"penalties.token_ids_RL has {len(token_ids)} rows, but there are {shape[0]} rows with penalties; give "
                "token_rows_R to look rows up"
            )


def adjust_logits(logits_SV: Tensor, addends: Addends | None, penalties: Penalties | None) -> None:
    """Apply addends, then penalties, to float32 `logits_SV` in place."""
    if addends is not None:
        logits_SV.index_put_((addends.rows_N, addends.token_ids_N), addends.values_N, accumulate=True)
    if penalties is not None:
        penalise(logits_SV, penalties)


def add_bias(
    logits_SV: Tensor,
    *,
    token_ids_SN: Tensor | None = None,
    values_SN: Tensor | None = None,
    stop_ids_SN: Tensor | None = None,
    position_S: Tensor | None = None,
    min_length_S: Tensor | None = None,
) -> None:
    """Add to single logits in place, then mask the stop tokens of rows that are still too short.

    Args:
        logits_SV: float32, float16 or bfloat16, last stride 1; mutated, and sums are rounded to its dtype.
        token_ids_SN: int32, unique in a row; those below 0 or past the vocabulary are passed over.
        values_SN: float32, with `token_ids_SN`; -inf takes the token out.
        stop_ids_SN: int32, any negative for none.
        position_S: int64, with `stop_ids_SN`: of the token to be drawn, in its sequence.
        min_length_S: int64, with `stop_ids_SN`: stop tokens get -inf at positions before this.

    Raises:
        ConfigError: A tensor of another shape, dtype, stride or device, or one without those that belong to it.
    """
    check_logits(logits_SV)
    num_rows, device = len(logits_SV), logits_SV.device
    _require_together(token_ids_SN=token_ids_SN, values_SN=values_SN)
    _require_together(stop_ids_SN=stop_ids_SN, position_S=position_S, min_length_S=min_length_S)
    if token_ids_SN is not None and values_SN is not None:
        shape = (num_rows, token_ids_SN.shape[-1])
        require("token_ids_SN", token_ids_SN, torch.int32, shape, device)
        require("values_SN", values_SN, torch.float32, shape, device)
    if stop_ids_SN is not None and position_S is not None and min_length_S is not None:
        require("stop_ids_SN", stop_ids_SN, torch.int32, (num_rows, stop_ids_SN.shape[-1]), device)
        require("position_S", position_S, torch.int64, (num_rows,), device)
        require("min_length_S", min_length_S, torch.int64, (num_rows,), device)
    if logits_SV.is_cuda:
        from .penalties_kernel import launch_add_bias

        add = launch_add_bias
    else:
        add = add_bias_reference
    add(
        logits_SV, token_ids_SN=token_ids_SN, values_SN=values_SN, stop_ids_SN=stop_ids_SN, position_S=position_S,
        min_length_S=min_length_S,
    )  # fmt: skip


def add_bias_reference(
    logits_SV: Tensor,
    *,
    token_ids_SN: Tensor | None = None,
    values_SN: Tensor | None = None,
    stop_ids_SN: Tensor | None = None,
    position_S: Tensor | None = None,
    min_length_S: Tensor | None = None,
) -> None:
    """`add_bias` in torch."""
    if token_ids_SN is not None and values_SN is not None:
        rows_N, entries_N = _find_tokens(token_ids_SN, logits_SV.shape[1])
        at = (rows_N, token_ids_SN[rows_N, entries_N].long())
        logits_SV[at] = (logits_SV[at].float() + values_SN[rows_N, entries_N]).to(logits_SV.dtype)
    if stop_ids_SN is not None and position_S is not None and min_length_S is not None:
        stop_ids_SN = stop_ids_SN.where((position_S < min_length_S)[:, None], -1)
        rows_N, entries_N = _find_tokens(stop_ids_SN, logits_SV.shape[1])
        logits_SV[rows_N, stop_ids_SN[rows_N, entries_N].long()] = -torch.inf


def _find_tokens(token_ids_SN: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """Rows and columns of the ids that are of the vocabulary."""
    return ((token_ids_SN >= 0) & (token_ids_SN < vocab_size)).nonzero(as_tuple=True)


def _require_together(**tensors: Tensor | None) -> None:
    missing = [name for name, x in tensors.items() if x is None]
    if missing and len(missing) < len(tensors):
        raise ConfigError(f"{', '.join(missing)} is missing: give all or none of {', '.join(tensors)}")


def penalise(logits_SV: Tensor, penalties: Penalties) -> None:
    """Apply penalties to rows of `logits_SV` in place, rounded to its dtype.

    Args:
        logits_SV: float32, float16 or bfloat16, last stride 1; mutated.
        penalties: Of some of its rows.

    Raises:
        ConfigError: A tensor of another shape, dtype, stride or device.
    """
    if logits_SV.is_cuda:
        from .penalties_kernel import launch_penalise

        launch_penalise(logits_SV, penalties)
    else:
        check_logits(logits_SV)
        penalties.check(logits_SV.device)
        penalise_reference(logits_SV, penalties)


def penalise_reference(logits_SV: Tensor, penalties: Penalties) -> None:
    """`penalise` in torch, in float32; waits for the device where `token_rows_R` is given."""
    if len(penalties.rows_R):
        penalised_RV = _penalise(logits_SV[penalties.rows_R].float(), penalties)
        logits_SV[penalties.rows_R] = penalised_RV.to(logits_SV.dtype)


def _penalise(logits_RV: Tensor, penalties: Penalties) -> Tensor:
    """Penalised logits; only those of tokens that occur are touched, each with the same value at every occurrence."""
    token_ids_RL = penalties.token_ids_RL
    if penalties.token_rows_R is not None:
        token_ids_RL = token_ids_RL[penalties.token_rows_R, : int(penalties.num_tokens_R.max())]
    token_ids_RL = token_ids_RL.long()
    position_L = torch.arange(token_ids_RL.shape[1], device=logits_RV.device)
    last_R1 = penalties.num_tokens_R[:, None] - 1
    # Padding repeats the last token, whose new value is then merely written again; without any, its own.
    token_ids_RL = token_ids_RL.gather(1, position_L.minimum(last_R1.clamp(min=0)))
    is_answer_RL = (position_L >= penalties.num_prompt_tokens_R[:, None]) & (position_L <= last_R1)
    count_RV = torch.zeros_like(logits_RV).scatter_add_(1, token_ids_RL, is_answer_RL.to(logits_RV.dtype))
    count_RL = count_RV.gather(1, token_ids_RL)
    before_RL = logits_RV.gather(1, token_ids_RL)
    repetition_R1 = penalties.repetition_R[:, None]
    value_RL = torch.where(before_RL > 0, before_RL / repetition_R1, before_RL * repetition_R1)
    value_RL -= penalties.frequency_R[:, None] * count_RL + penalties.presence_R[:, None] * (count_RL > 0)
    return logits_RV.scatter(1, token_ids_RL, value_RL.where(last_R1 >= 0, before_RL))
