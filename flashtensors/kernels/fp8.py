"""The eight-bit float of caches and of weights: e4m3, without infinities."""

from __future__ import annotations

import torch

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest value of `FP8_DTYPE`."""
