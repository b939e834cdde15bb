"""Gemma 3, text (Gemma team, 2025).

Four norms in a layer, each scaled by 1 + w; q and k heads are normalised before rope; a GELU-gated MLP; embeddings are
scaled by sqrt(hidden_size). Most layers see a sliding window and have a rope of their own base frequency. Note that a
checkpoint's `post_attention_layernorm` is not, as in Llama, the norm before the MLP.
"""

from __future__ import annotations

from ..kernels.norm import gemma_rms_norm
from .family import Family

GEMMA3 = Family(
    norm=gemma_rms_norm,
    attention_norm="input_layernorm",
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
