"""The parts of a decoder layer, as callables over weights that someone else owns.

Shapes: T rows of the step, S rows that are sampled, E hidden size, H query heads, K key-value heads, D head dim,
M intermediate size, X experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.attention.batch import AttentionBatch
from ..kernels.attention.paged import append_kv, paged_attention
from ..kernels.fp8_linear import fp8_linear
from ..kernels.linear import linear
from ..kernels.moe import moe
from ..kernels.moe_routing import Routing, route
from ..kernels.norm import NormKernel, add_rms_norm, gemma_rms_norm
from ..kernels.rope import Rotation, apply_rope
from ..kernels.rope_append import QkNorm, rope_append

KvCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[num_blocks, K, block_size, D]`."""

Gate = Callable[[int | None], None]
"""Called before the kernels of a layer are queued, with its index, and with None before whatever needs all weights.

Makes the current stream wait until those weights have landed; raises `FlashError` if their load failed. What comes
before layer 0 has landed when layer 0 has.
"""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A projection; its weight comes from `pack_weight`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`x Wᵀ + b`."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class Fp8Linear:
    """A projection whose weight stays in fp8."""

    weight: Tensor
    scale: Tensor
    """Of each row, or of each block; see `fp8_linear`."""
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`x Wᵀ + b`."""
        return fp8_linear(x, self.weight, self.scale, self.bias)


Projection = Linear | Fp8Linear


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """A norm of the last dimension."""

    kernel: NormKernel
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """`x` normalised."""
        return self.kernel(x, self.weight, self.eps)

    def of_sum(self, update_TE: Tensor, residual_TE: Tensor) -> Tensor:
        """Add `update_TE` to `residual_TE` in place, and normalise the sum."""
        return add_rms_norm(update_TE, residual_TE, self.weight, self.eps, self.kernel)


@dataclass(frozen=True, kw_only=True)
class Rotations:
    """The angles that layers turn queries and keys by: rows of a step, or a table of positions."""

    plain: Rotation
    local: Rotation
    """Of sliding-window layers; `plain` itself where they do not differ."""
    positions_T: Tensor | None = None
    """int64: which row of the tables belongs to each row of the step; None: they are its rows."""

    def at(self, positions_T: Tensor) -> Rotations:
        """These tables, looked up at a step's positions."""
        return replace(self, positions_T=positions_T)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention with rope over a paged cache."""

    qkv: Projection
    out: Projection
    q_norm: RmsNorm | None
    """On each head of q before rope; None: there is none, nor for k."""
    k_norm: RmsNorm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    softcap: float | None

    has_local_rope: bool
    """Takes the rotation of sliding-window layers."""

    def __call__(
        self, x_TE: Tensor, rotations: Rotations, kv_cache: KvCache, batch: AttentionBatch, rows_S: Tensor | None
    ) -> Tensor:
        """What attention adds to the residual: `[T, E]`, or `[S, E]` for the rows in `rows_S`. Fills `kv_cache`."""
        attend = self._attend_by_parts if batch.works is None else self._attend_fused
        attended_THD = attend(self.qkv(x_TE), rotations, kv_cache, batch)
        if rows_S is not None:
            attended_THD = attended_THD.index_select(0, rows_S)
        return self.out(attended_THD.flatten(1))

    def _attend_by_parts(self, qkv: Tensor, rotations: Rotations, kv_cache: KvCache, batch: AttentionBatch) -> Tensor:
        """With torch's own operations, from lengths that the host knows."""
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        qkv = qkv.view(-1, num_heads + 2 * num_kv_heads, self.head_dim)
        qk, v_TKD = qkv.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :num_heads]), self.k_norm(qk[:, num_heads:])), dim=1)
        rotation = rotations.local if self.has_local_rope else rotations.plain
        q_THD, k_TKD = apply_rope(qk, rotation).split_with_sizes((num_heads, num_kv_heads), dim=1)
        append_kv(k_TKD, v_TKD, *kv_cache, batch)
        return paged_attention(
            q_THD, *kv_cache, batch, scale=self.scale, sliding_window=self.sliding_window, softcap=self.softcap
        )

    def _attend_fused(self, qkv: Tensor, rotations: Rotations, kv_cache: KvCache, batch: AttentionBatch) -> Tensor:
        """With kernels that read all lengths on the device, so that a CUDA graph may hold them."""
        from ..kernels.attention.ragged import ragged_attention

        assert batch.works is not None, "a batch without planned work"
        rotation = rotations.local if self.has_local_rope else rotations.plain
        q_THD = rope_append(
            qkv,
            rotation,
            *kv_cache,
            batch.slot_mapping,
            num_heads=self.num_heads,
            positions_T=rotations.positions_T,
            norm=self._qk_norm(),
            scales=batch.kv_scales,
        )
        scales = batch.kv_scales
        return ragged_attention(
            q_THD,
            *kv_cache,
            batch.block_tables,
            batch.works[self.sliding_window],
            scale=self.scale,
            softcap=self.softcap,
            k_scales_K=None if scales is None else scales.k_scale_K,
            v_scales_K=None if scales is None else scales.v_scale_K,
        )

    def _qk_norm(self) -> QkNorm | None:
        if self.q_norm is None or self.k_norm is None:
            return None
        return QkNorm(
            q_weight_D=self.q_norm.weight,
            k_weight_D=self.k_norm.weight,
            eps=self.q_norm.eps,
            is_gemma=self.q_norm.kernel is gemma_rms_norm,
        )


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """down(activation(gate) * up)."""

    gate_up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    """`[T, M]` from the fused `[T, 2 M]`."""

    def __call__(self, x_TE: Tensor) -> Tensor:
        """What the MLP adds to the residual."""
        return self.down(self.activation(self.gate_up(x_TE)))


@dataclass(frozen=True, kw_only=True)
class SparseMlp:
    """A mixture of X experts, of which each row takes a few."""

    router: Linear
    gate_up_XNE: Tensor
    """N = 2 M: rows of gate, then of up."""
    down_XEM: Tensor
    routing: Routing

    def __call__(self, x_TE: Tensor) -> Tensor:
        """What the experts add to the residual."""
        return moe(x_TE, self.gate_up_XNE, self.down_XEM, *route(self.router(x_TE), self.routing))


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """Attention and MLP on a residual stream, with norms before and, in some families, after each."""

    attention_norm: RmsNorm
    attention: Attention
    attention_out_norm: RmsNorm | None
    mlp_norm: RmsNorm
    mlp: GatedMlp | SparseMlp
    mlp_out_norm: RmsNorm | None

    def __call__(
        self,
        residual_TE: Tensor,
        update_TE: Tensor | None,
        rotations: Rotations,
        kv_cache: KvCache,
        batch: AttentionBatch,
        rows_S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what is still to be added to it: the next norm does both in one pass.

        Args:
            residual_TE: Updated in place, unless there are `rows_S`.
            update_TE: What the layer before adds to it; None: nothing.
            rotations: Angles.
            kv_cache: This layer's; gains the step's keys and values.
            batch: The step.
            rows_S: Rows that go on after attention, as copies; None: all of them.
        """
        norm = self.attention_norm
        x_TE = norm(residual_TE) if update_TE is None else norm.of_sum(update_TE, residual_TE)
        update = self.attention(x_TE, rotations, kv_cache, batch, rows_S)
        residual = residual_TE if rows_S is None else residual_TE.index_select(0, rows_S)
        if self.attention_out_norm is not None:
            update = self.attention_out_norm(update)
        update = self.mlp(self.mlp_norm.of_sum(update, residual))
        if self.mlp_out_norm is not None:
            update = self.mlp_out_norm(update)
        return residual, update
