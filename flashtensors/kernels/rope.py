"""Rotary position embedding (Su et al., 2021), in the half-split convention of Hugging Face checkpoints.

With angles θ_j = position * inverse_frequency_j for j < D / 2, elements j and j + D / 2 of a head turn together:

    y_j         = x_j         * cos θ_j - x_{j + D/2} * sin θ_j
    y_{j + D/2} = x_{j + D/2} * cos θ_j + x_j         * sin θ_j

Partial rotary: where frequencies are of R < D elements, the first R of a head turn so and the others stay.

Cosines and sines are made from positions once a step and shared by all layers: 2048 rows cost about a millisecond. A
step in a CUDA graph looks them up in a table instead, which for 131072 positions holds 64 MB.

Shapes: T rows, H heads, D head dim, R rotary dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import require_that


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosines and sines of a step's rows, in the dtype of queries and keys."""

    cos_T1D: Tensor
    """Both halves alike."""
    sin_T1D: Tensor
    """The first half negated, as it is used."""


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """`theta ** (-2j / head_dim)` for j < head_dim / 2, fp32; `head_dim` is R where heads turn partly."""
    require_that(head_dim > 0 and head_dim % 2 == 0, "head_dim", head_dim, "even and above 0")
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def scale_linear(frequencies: Tensor, *, factor: float) -> Tensor:
    """Frequencies of positions that are interpolated (Chen et al., arXiv 2306.15595): all waves longer by `factor`."""
    require_that(factor > 0, "factor", factor, "above 0")
    return frequencies / factor


def scale_llama3(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_position: int
) -> Tensor:
    """Frequencies as Llama 3.1 stretches them: long waves by `factor`, short waves not, a blend in between.

    A wave is long from `original_max_position / low_freq_factor` positions on, and short up to
    `original_max_position / high_freq_factor`.
    """
    wavelengths = 2 * math.pi / frequencies
    blend = (original_max_position / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    is_long = wavelengths > original_max_position / low_freq_factor
    is_short = wavelengths < original_max_position / high_freq_factor
    return torch.where(is_long, frequencies / factor, torch.where(is_short, frequencies, blended))


def yarn_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    original_max_position: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Inverse frequencies as YaRN stretches them (Peng et al., arXiv 2309.00071, section 3.2), fp32.

    Waves that turn more than `beta_fast` times in `original_max_position` positions stay, those that turn less than
    `beta_slow` times are stretched by `factor`. In between the share of the stretched wave rises linearly with j, as in
    the authors' code and in transformers; the paper's equation has it fall linearly with the number of turns.

    Args:
        head_dim: D.
        theta: Base frequency, above 1.
        factor: Of the context, at least 1.
        original_max_position: Positions that the model was trained for before.
        beta_fast: At least `beta_slow`.
        beta_slow: Above 0.
        truncate: Widen the blend to whole j.

    Raises:
        ConfigError: A number out of its range, by name.
    """
    require_that(theta > 1, "theta", theta, "above 1")
    require_that(factor >= 1, "factor", factor, "at least 1")
    require_that(original_max_position >= 1, "original_max_position", original_max_position, "at least 1")
    require_that(beta_slow > 0, "beta_slow", beta_slow, "above 0")
    require_that(beta_fast >= beta_slow, "beta_fast", beta_fast, f"at least beta_slow ({beta_slow})")
    # theta ** (-2j / D) * original_max_position / 2π turns, solved for j
    first, last = (
        head_dim * math.log(original_max_position / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (beta_fast, beta_slow)
    )
    first, last = (min(max(place, 0.0), head_dim - 1) for place in (first, last))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - first) / max(last - first, 1e-3)
    kept = 1.0 - ramp.clamp(0.0, 1.0)
    periods = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1.0 / periods * kept + 1.0 / (factor * periods) * (1.0 - kept)


def yarn_attention_factor(factor: float, *, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """What YaRN multiplies cosines and sines with, so that scores grow by its square (arXiv 2309.00071, equation 22).

    It is `0.1 ln(factor) + 1`. With both `mscale` and `mscale_all_dim`, as DeepSeek-V2 (arXiv 2405.04434) introduced
    them, it is the quotient of two such terms whose logarithms are weighted by them; one alone has no effect.

    Raises:
        ConfigError: `factor` is below 1.
    """
    require_that(factor >= 1, "factor", factor, "at least 1")
    growth = 0.1 * math.log(factor)
    if not mscale or not mscale_all_dim:
        return growth + 1.0
    return (mscale * growth + 1.0) / (mscale_all_dim * growth + 1.0)


def rotation(
    positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype, *, attention_factor: float = 1.0
) -> Rotation:
    """Cosines and sines at `positions_T`, times `attention_factor`, computed in fp32 and rounded to `dtype`."""
    angles = positions_T[:, None, None].float() * frequencies
    cos, sin = angles.cos().mul_(attention_factor), angles.sin().mul_(attention_factor)
    return Rotation(cos_T1D=torch.cat((cos, cos), -1).to(dtype), sin_T1D=torch.cat((-sin, sin), -1).to(dtype))


def apply_rope(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head of `x_THD` by its row's angles; any strides, a new tensor. Bit-equal to transformers.

    Raises:
        ConfigError: The rotation is of more elements than heads have.
    """
    rotary_dim, head_dim = rotation.cos_T1D.shape[-1], x_THD.shape[-1]
    if rotary_dim != head_dim:
        require_that(rotary_dim < head_dim, "rotation", rotary_dim, f"of at most {head_dim} elements, as heads have")
        return torch.cat((apply_rope(x_THD[..., :rotary_dim], rotation), x_THD[..., rotary_dim:]), -1)
    swapped_THD = x_THD.roll(head_dim // 2, -1)
    return (x_THD * rotation.cos_T1D).add_(swapped_THD.mul_(rotation.sin_T1D))


def apply_rope_reference(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """`apply_rope` by its definition, each half on its own."""
    cos, sin = rotation.cos_T1D.chunk(2, -1)[0], rotation.sin_T1D.chunk(2, -1)[1]
    half = cos.shape[-1]
    first, second, rest = x_THD.tensor_split((half, 2 * half), -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
