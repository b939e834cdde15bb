"""Qwen3 mixtures of experts (Qwen team, 2025): Qwen3, but for the MLPs of some layers or of all."""

from __future__ import annotations

from ..kernels.norm import rms_norm
from .family import ExpertNames, Family

QWEN_MOE = Family(
    norm=rms_norm,
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    experts=ExpertNames(router="mlp.gate", experts="mlp.experts", gate="gate_proj", up="up_proj", down="down_proj"),
)
