"""Mixtral (Jiang et al., 2024): a Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from ..kernels.norm import rms_norm
from .family import ExpertNames, Family

MIXTRAL = Family(
    norm=rms_norm,
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    experts=ExpertNames(
        router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate="w1", up="w3", down="w2"
    ),
)
