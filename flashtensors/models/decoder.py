"""The one decoder that all families are: embedding, layers, norm, head.

Shapes: T rows of the step, S rows that are sampled, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention.batch import AttentionBatch
from ..kernels.rope import rotation
from .layers import DecoderLayer, KvCache, Linear, RmsNorm


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only language model over weights in an arena; made by `build_decoder`."""

    embedding_VE: Tensor
    embedding_scale: float
    """Already rounded to the dtype of the weights."""
    layers: tuple[DecoderLayer, ...]
    norm: RmsNorm
    head: Linear
    logit_softcap: float | None
    frequencies: Tensor
    """Inverse rope frequencies."""
    local_frequencies: Tensor | None
    """Those of sliding-window layers, where they differ."""

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        kv_caches: Sequence[KvCache],
        batch: AttentionBatch,
        sample_rows_S: Tensor,
    ) -> Tensor:
        """Logits `[S, V]` of the sampled rows, in the dtype of the weights; the caches gain the step's keys and values.

        Args:
            token_ids_T: int64.
            positions_T: int64, the place of each token in its sequence.
            kv_caches: One pair for each layer.
            batch: Which row belongs to which sequence.
            sample_rows_S: int64; may be empty. After attention, the last layer computes only these.
        """
        x_TE = F.embedding(token_ids_T, self.embedding_VE)
        if self.embedding_scale != 1.0:
            x_TE.mul_(self.embedding_scale)
        dtype = x_TE.dtype
        rotation_global = rotation_local = rotation(positions_T, self.frequencies, dtype)
        if self.local_frequencies is not None:
            rotation_local = rotation(positions_T, self.local_frequencies, dtype)
        last = self.layers[-1]
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            rotation_TD = rotation_local if layer.has_local_rope else rotation_global
            x_TE = layer(x_TE, rotation_TD, kv_cache, batch, sample_rows_S if layer is last else None)
        logits_SV = self.head(self.norm(x_TE))
        if self.logit_softcap is not None:
            logits_SV = torch.tanh_(logits_SV.div_(self.logit_softcap)).mul_(self.logit_softcap)
        return logits_SV
