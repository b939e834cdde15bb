"""Rotary position embedding (Su et al., 2021), in the half-split convention of Hugging Face checkpoints.

With angles θ_j = position * inverse_frequency_j for j < D / 2, elements j and j + D / 2 of a head turn together:

    y_j         = x_j         * cos θ_j - x_{j + D/2} * sin θ_j
    y_{j + D/2} = x_{j + D/2} * cos θ_j + x_j         * sin θ_j

Cosines and sines are made from positions once a step and shared by all layers, not kept in a table: 2048 rows cost
about a millisecond, while a table for 131072 positions would hold 64 MB for every loaded model.

Shapes: T rows, H heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosines and sines of a step's rows, in the dtype of queries and keys."""

    cos_T1D: Tensor
    """Both halves alike."""
    sin_T1D: Tensor
    """The first half negated, as it is used."""


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """`theta ** (-2j / head_dim)` for j < head_dim / 2, fp32."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


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


def rotation(positions_T: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines at `positions_T`, computed in fp32 and rounded to `dtype`."""
    angles = positions_T[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rotation(cos_T1D=torch.cat((cos, cos), -1).to(dtype), sin_T1D=torch.cat((-sin, sin), -1).to(dtype))


def apply_rope(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """Turn every head of `x_THD` by its row's angles; any strides, a new tensor. Bit-equal to transformers."""
    swapped_THD = x_THD.roll(x_THD.shape[-1] // 2, -1)
    return (x_THD * rotation.cos_T1D).add_(swapped_THD.mul_(rotation.sin_T1D))


def apply_rope_reference(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """`apply_rope` by its definition, each half on its own."""
    cos, sin = rotation.cos_T1D.chunk(2, -1)[0], rotation.sin_T1D.chunk(2, -1)[1]
    first, second = x_THD.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
