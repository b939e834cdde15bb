"""Qwen2, Qwen2.5 and Qwen3 dense (Qwen team, 2024 and 2025).

A Llama decoder whose q, k and v projections have a bias (Qwen2), or whose q and k heads are normalised before rope
(Qwen3). Contexts beyond 32768 tokens stretch rope (`yarn`). All are in `ModelConfig`.
"""

from __future__ import annotations

from ..kernels.norm import rms_norm
from .family import Family

QWEN = Family(norm=rms_norm, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
