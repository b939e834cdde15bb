"""Choosing tokens where every row says on the device how it draws: one set of launches serves any mix of rows.

    rows = SamplingRows(temperature_S=…, top_k_S=…, top_p_S=…, min_p_S=…, seed_S=…, position_S=…)
    token_ids, is_valid = sample_rows(logits, rows)
    token_ids, is_valid, is_finished = sample_rows(logits, rows, stop_ids_SN=…)

Formulas are those of `sampling.py`. Bias, masks and penalties come first, on the logits: `penalties.py`.

Shapes: S rows, V vocabulary, N stop ids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import overload

import torch
from torch import Tensor

from .arguments import check_logits, require
from .sampling import Draws, sample, uniform

_DTYPES = {
    "temperature_S": torch.float32,
    "top_k_S": torch.int64,
    "top_p_S": torch.float64,
    "min_p_S": torch.float32,
    "seed_S": torch.int64,
    "position_S": torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Sampling parameters of S rows; contiguous tensors of one device, so that a CUDA graph may read new values.

    Values are not looked at before they are used, since that would wait for the device.
    """

    temperature_S: Tensor
    """float32 [S], at least 0; 0 is greedy."""
    top_k_S: Tensor
    """int64 [S], at least 0; 0, or more than the vocabulary, keeps all."""
    top_p_S: Tensor
    """float64 [S] in (0, 1]."""
    min_p_S: Tensor
    """float32 [S] in [0, 1]."""
    seed_S: Tensor
    """int64 [S], any: of the sequence."""
    position_S: Tensor
    """int64 [S]: of the token that is drawn, in its sequence; a position is drawn once with a seed."""

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device | str) -> SamplingRows:
        """Rows that take the first largest logit."""
        rows = {name: torch.zeros(num_rows, dtype=dtype, device=device) for name, dtype in _DTYPES.items()}
        rows["top_p_S"].fill_(1.0)
        return cls(**rows)

    def part(self, begin: int, end: int) -> SamplingRows:
        """Some neighbouring rows; the same memory."""
        return SamplingRows(**{name: getattr(self, name)[begin:end] for name in _DTYPES})

    @classmethod
    def from_draws(cls, draws: list[Draws], num_rows: int, device: torch.device) -> SamplingRows:
        """The same draws as `sampling.sample` takes; rows in none of them are greedy."""
        if len(draws) == 1 and len(draws[0].rows_R) == num_rows:
            return cls(**{name: getattr(draws[0], f"{name[:-2]}_R") for name in _DTYPES})
        rows = cls.greedy(num_rows, device)
        for group in draws:
            for name in _DTYPES:
                getattr(rows, name).index_copy_(0, group.rows_R, getattr(group, f"{name[:-2]}_R"))
        return rows

    def to_draws(self, vocab_size: int) -> list[Draws]:
        """Groups for `sampling.sample`; waits for the device."""
        host = {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}
        is_truncated = ((host["top_k_S"] > 0) & (host["top_k_S"] < vocab_size)) | (host["top_p_S"] < 1.0)
        is_drawn = host["temperature_S"] > 0
        groups = []
        for is_member in (is_drawn & ~is_truncated, is_drawn & is_truncated):
            index = is_member.nonzero()[0]
            if len(index):
                columns = {name[:-2]: values[index] for name, values in host.items()}
                columns["top_k"] = columns["top_k"] * (columns["top_k"] < vocab_size)
                groups.append(Draws.of(rows=index, device=self.seed_S.device, **columns))
        return groups

    def check(self, num_rows: int, device: torch.device) -> None:
        """Raise `ConfigError` for the first tensor that kernels could not read."""
        for name, dtype in _DTYPES.items():
            require(name, getattr(self, name), dtype, (num_rows,), device)


@overload
def sample_rows(
    logits_SV: Tensor, rows: SamplingRows, *, stop_ids_SN: None = None, has_nuclei: bool = True
) -> tuple[Tensor, Tensor]: ...
@overload
def sample_rows(
    logits_SV: Tensor, rows: SamplingRows, *, stop_ids_SN: Tensor, has_nuclei: bool = True
) -> tuple[Tensor, Tensor, Tensor]: ...
def sample_rows(
    logits_SV: Tensor, rows: SamplingRows, *, stop_ids_SN: Tensor | None = None, has_nuclei: bool = True
) -> tuple[Tensor, ...]:
    """Choose a token for each row, as `rows` says.

    A draw depends on its row alone: its logits, parameters, seed and position, never on the batch. On a GPU nothing
    waits for the device, so a CUDA graph may capture it.

    Args:
        logits_SV: float32, float16 or bfloat16 after bias and penalties, last stride 1; -inf is never drawn.
        rows: How each row draws, on the device of the logits.
        stop_ids_SN: int32, contiguous: tokens that end a row's answer; those below 0 are padding.
        has_nuclei: False promises that no row has top-p without top-k, and saves a launch.

    Returns:
        int64 [S] token ids, and bool [S]: False, with token 0, where the largest logit is not a finite number, or one
        is NaN. With `stop_ids_SN` also bool [S]: whether the token is valid and one of its row's stop ids.

    Raises:
        ConfigError: A tensor of another shape, dtype, stride or device.
    """
    if logits_SV.is_cuda:
        from .sampling_launch import launch_sample

        sampled = launch_sample(logits_SV, rows, stop_ids_SN=stop_ids_SN, has_nuclei=has_nuclei)
        drawn = sampled.token_ids_S, sampled.is_valid_S
        return drawn if stop_ids_SN is None else (*drawn, sampled.is_finished_S)
    check_draws(logits_SV, rows, stop_ids_SN)
    return _with_stops(*sample(logits_SV.float(), rows.to_draws(logits_SV.shape[1])), stop_ids_SN)


def check_draws(logits_SV: Tensor, rows: SamplingRows, stop_ids_SN: Tensor | None) -> None:
    """Raise `ConfigError` for the first tensor that kernels could not read."""
    check_logits(logits_SV)
    num_rows, device = len(logits_SV), logits_SV.device
    rows.check(num_rows, device)
    if stop_ids_SN is not None:
        require("stop_ids_SN", stop_ids_SN, torch.int32, (num_rows, stop_ids_SN.shape[-1]), device)


def _with_stops(token_ids_S: Tensor, is_valid_S: Tensor, stop_ids_SN: Tensor | None) -> tuple[Tensor, ...]:
    if stop_ids_SN is None:
        return token_ids_S, is_valid_S
    return token_ids_S, is_valid_S, (stop_ids_SN == token_ids_S[:, None]).any(1) & is_valid_S


def sample_rows_reference(
    logits_SV: Tensor, rows: SamplingRows, *, stop_ids_SN: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`sample_rows` by its definition: all tokens sorted, sums in float64."""
    vocab_size = logits_SV.shape[1]
    is_truncated_S = ((rows.top_k_S > 0) & (rows.top_k_S < vocab_size)) | (rows.top_p_S < 1.0)
    by_logit_SV = logits_SV.float().argsort(dim=1, descending=True, stable=True)
    by_id_V = torch.arange(vocab_size, device=logits_SV.device)
    order_SV = by_logit_SV.where(is_truncated_S[:, None], by_id_V)
    cumulative_SV = token_probabilities(logits_SV.float(), rows).gather(1, order_SV).cumsum(1)
    target_S1 = uniform(rows.seed_S, rows.position_S)[:, None] * cumulative_SV[:, -1:]
    picked_S1 = torch.searchsorted(cumulative_SV, target_S1, right=True).clamp_(max=vocab_size - 1)
    is_valid_S = logits_SV.amax(1).isfinite()
    token_ids_S = order_SV.gather(1, picked_S1).squeeze(1).where(is_valid_S, 0)
    return _with_stops(token_ids_S, is_valid_S, stop_ids_SN)


def token_probabilities(logits_SV: Tensor, rows: SamplingRows) -> Tensor:
    """float64 [S, V] probabilities with which each row draws each token; greedy rows have a single 1."""
    peak_S1, greedy_S1 = logits_SV.max(1, keepdim=True)[0], logits_SV.argmax(1, keepdim=True)
    temperature_S1 = rows.temperature_S[:, None].where(rows.temperature_S[:, None] > 0, 1.0).clamp(min=1e-30)
    weights_SV = ((logits_SV - peak_S1) / temperature_S1).exp().double()
    order_SV = logits_SV.sort(dim=1, descending=True, stable=True)[1]
    sorted_SV = weights_SV.gather(1, order_SV)
    rank_V = torch.arange(logits_SV.shape[1], device=logits_SV.device)
    is_kept_SV = (rank_V < rows.top_k_S[:, None]) | (rows.top_k_S[:, None] == 0)
    mass_S1 = (sorted_SV * is_kept_SV).sum(1, keepdim=True)
    before_SV = sorted_SV.cumsum(1) - sorted_SV
    is_kept_SV &= (before_SV < rows.top_p_S[:, None] * mass_S1) | (rows.top_p_S[:, None] >= 1.0)
    is_kept_SV &= sorted_SV >= rows.min_p_S[:, None]
    is_kept_SV[:, 0] = True
    kept_SV = torch.zeros_like(weights_SV).scatter_(1, order_SV, sorted_SV * is_kept_SV)
    greedy_SV = torch.zeros_like(weights_SV).scatter_(1, greedy_S1, 1.0)
    return torch.where(rows.temperature_S[:, None] > 0, kept_SV / kept_SV.sum(1, keepdim=True), greedy_SV)
