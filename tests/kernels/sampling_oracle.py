"""Rows for kernels that sample, and what they must draw from, by the definitions in fp64."""

from __future__ import annotations

import math

import numpy as np
import torch

from flashtensors.kernels.sampling_launch import Cuts
from flashtensors.kernels.sampling_rows import SamplingRows

from .tolerances import DEVICE

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 3}

SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100_000_000},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.99, "temperature": 1.5},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.05, "temperature": 0.7},
    {"top_p": 0.95, "min_p": 0.3, "temperature": 1.7},
]


def make_rows(settings: list[dict]) -> SamplingRows:
    settings = [{**DEFAULTS, **setting} for setting in settings]

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([setting[name] for setting in settings], dtype=dtype, device=DEVICE)

    return SamplingRows(
        temperature_S=column("temperature", torch.float32),
        top_k_S=column("top_k", torch.int64),
        top_p_S=column("top_p", torch.float64),
        min_p_S=column("min_p", torch.float32),
        seed_S=column("seed", torch.int64),
        position_S=column("position", torch.int64),
    )


def probabilities(logits: torch.Tensor, setting: dict) -> np.ndarray:
    """The distribution of one row: sort, truncate three times, renormalise."""
    setting = {**DEFAULTS, **setting}
    values = logits.double().cpu().numpy()
    order = np.argsort(-values, kind="stable")
    weights = np.zeros(len(values))
    if setting["temperature"] == 0:
        weights[order[0]] = 1.0
        return weights
    sorted_weights = np.exp((values[order] - values.max()) / setting["temperature"])
    is_kept = np.arange(len(values)) < (setting["top_k"] or len(values))
    goal = setting["top_p"] * sorted_weights[is_kept].sum()
    if setting["top_p"] < 1:
        is_kept &= np.cumsum(sorted_weights) - sorted_weights < goal
    is_kept &= sorted_weights >= np.float32(setting["min_p"])
    weights[order] = sorted_weights * is_kept
    return weights / weights.sum()


def probabilities_of_cuts(logits: torch.Tensor, cuts: Cuts, row: int, setting: dict) -> np.ndarray:
    """The distribution that a kernel says it drew from."""
    setting = {**DEFAULTS, **setting}
    values = logits.double().cpu().numpy()
    weights = np.exp((values - cuts.peak_S[row].item()) / (setting["temperature"] or 1.0))
    cut, last_id = cuts.value_S[row].item(), cuts.token_id_S[row].item()
    is_kept = (values > cut) | ((values == cut) & (np.arange(len(values)) <= last_id))
    if setting["temperature"]:
        is_kept &= weights >= np.float32(setting["min_p"]) * (1 - 1e-7)
    return weights * is_kept / cuts.mass_S[row].item()


def assert_draws_fit(token_ids: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square of draws against exact probabilities, failing a right sampler less than once in a million times."""
    counts = np.bincount(token_ids, minlength=len(expected))
    assert not counts[expected == 0].any(), "a token outside the support was drawn"
    wanted = expected * counts.sum()
    is_common = wanted > 5
    observed = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(wanted[is_common], wanted[~is_common].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    degrees = len(wanted) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 4.9 * math.sqrt(2 / (9 * degrees))) ** 3 if degrees else 1e-9
    assert ((observed - wanted) ** 2 / wanted).sum() <= bound
