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
from ..kernels.embedding import embed
from ..kernels.rope import rotation
from .layers import DecoderLayer, Gate, KvCache, Linear, RmsNorm, Rotations


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
    attention_factor: float
    """On their cosines and sines."""
    local_frequencies: Tensor | None
    """Those of sliding-window layers, where they differ."""

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        kv_caches: Sequence[KvCache],
        batch: AttentionBatch,
        sample_rows_S: Tensor | None,
        *,
        rotations: Rotations | None = None,
        gate: Gate | None = None,
    ) -> Tensor:
        """Logits `[S, V]` of the sampled rows, in the dtype of the weights; the caches gain the step's keys and values.

        Args:
            token_ids_T: int64, or int32 on CUDA, where an id outside the vocabulary is a row of padding.
            positions_T: int64, the place of each token in its sequence.
            kv_caches: One pair for each layer.
            batch: Which row belongs to which sequence. With `works` the step is made of kernels that a CUDA graph may
                hold, and `rotations` are needed.
            sample_rows_S: int64; may be empty. After attention, the last layer computes only these. None: all rows.
            rotations: Tables from `make_rotations`; None: angles are made for this step.
            gate: Asked before each layer, and before the head.
        """
        if gate is not None:
            gate(0)
        residual_TE, update_TE = self._embed(token_ids_T, batch), None
        rotations = self._rotate(positions_T) if rotations is None else rotations.at(positions_T)
        last = len(self.layers) - 1
        for index, (layer, kv_cache) in enumerate(zip(self.layers, kv_caches, strict=True)):
            if gate is not None:
                gate(index)
            rows_S = sample_rows_S if index == last else None
            residual_TE, update_TE = layer(residual_TE, update_TE, rotations, kv_cache, batch, rows_S)
        if gate is not None:
            gate(None)
        assert update_TE is not None, "a decoder without layers"
        logits_SV = self.head(self.norm.of_sum(update_TE, residual_TE))
        if self.logit_softcap is not None:
            logits_SV = torch.tanh_(logits_SV.div_(self.logit_softcap)).mul_(self.logit_softcap)
        return logits_SV

    def _embed(self, token_ids_T: Tensor, batch: AttentionBatch) -> Tensor:
        if batch.works is not None or token_ids_T.is_cuda:
            return embed(token_ids_T, self.embedding_VE, scale=self.embedding_scale)
        x_TE = F.embedding(token_ids_T, self.embedding_VE)
        return x_TE if self.embedding_scale == 1.0 else x_TE.mul_(self.embedding_scale)

    def make_rotations(self, num_positions: int) -> Rotations:
        """Tables of the angles of positions 0 … `num_positions` - 1."""
        return self._rotate(torch.arange(num_positions, device=self.frequencies.device))

    def _rotate(self, positions_T: Tensor) -> Rotations:
        dtype = self.embedding_VE.dtype
        plain = rotation(positions_T, self.frequencies, dtype, attention_factor=self.attention_factor)
        local = plain if self.local_frequencies is None else rotation(positions_T, self.local_frequencies, dtype)
        return Rotations(plain=plain, local=local)
