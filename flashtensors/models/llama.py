"""Llama 2 and 3 (Touvron et al., 2023; Llama team, 2024) and Mistral (Jiang et al., 2023).

The plain decoder: RMSNorm, grouped-query attention with rope, a SiLU-gated MLP. Llama 3.1 stretches rope (`llama3`),
Mistral limits attention to a sliding window; both are in `ModelConfig`.
"""

from __future__ import annotations

from ..kernels.norm import rms_norm
from .family import Family

LLAMA = Family(norm=rms_norm, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
