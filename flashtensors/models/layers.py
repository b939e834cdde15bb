"""The parts of a decoder layer, as callables over weights that someone else owns.

Shapes: T rows of the step, S rows that are sampled, E hidden size, H query heads, K key-value heads, D head dim,
M intermediate size, X experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.attention.batch import AttentionBatch
from ..kernels.attention.paged import append_kv, paged_attention
from ..kernels.linear import linear
from ..kernels.moe import moe
from ..kernels.moe_routing import Routing, route
from ..kernels.norm import NormKernel, add_rms_norm
from ..kernels.rope import Rotation, apply_rope

KvCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each `[num_blocks, K, block_size, D]`."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A projection; its weight comes from `pack_weight`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """`x Wᵀ + b`."""
        return linear(x, self.weight, self.bias)


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
class Attention:
    """Grouped-query attention with rope over a paged cache."""

    qkv: Linear
    out: Linear
    q_norm: RmsNorm | None
    """On each head of q before rope; None: there is none, nor for k."""
    k_norm: RmsNorm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    softcap: float | None

    def __call__(
        self, x_TE: Tensor, rotation: Rotation, kv_cache: KvCache, batch: AttentionBatch, rows_S: Tensor | None
    ) -> Tensor:
        """What attention adds to the residual: `[T, E]`, or `[S, E]` for the rows in `rows_S`. Fills `kv_cache`."""
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x_TE).view(-1, num_heads + 2 * num_kv_heads, self.head_dim)
        qk, v_TKD = qkv.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :num_heads]), self.k_norm(qk[:, num_heads:])), dim=1)
        q_THD, k_TKD = apply_rope(qk, rotation).split_with_sizes((num_heads, num_kv_heads), dim=1)
        append_kv(k_TKD, v_TKD, *kv_cache, batch)
        attended_THD = paged_attention(
            q_THD,
            *kv_cache,
            batch,
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
        )
        if rows_S is not None:
            attended_THD = attended_THD.index_select(0, rows_S)
        return self.out(attended_THD.flatten(1))


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """down(activation(gate) * up)."""

    gate_up: Linear
    down: Linear
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
    has_local_rope: bool
    """Takes the rotation of sliding-window layers."""

    def __call__(
        self, x_TE: Tensor, rotation: Rotation, kv_cache: KvCache, batch: AttentionBatch, rows_S: Tensor | None = None
    ) -> Tensor:
        """The residual stream after this layer: `x_TE` itself, updated in place, or a copy of its `rows_S` alone."""
        update = self.attention(self.attention_norm(x_TE), rotation, kv_cache, batch, rows_S)
        x = x_TE if rows_S is None else x_TE.index_select(0, rows_S)
        if self.attention_out_norm is not None:
            update = self.attention_out_norm(update)
        update = self.mlp(self.mlp_norm.of_sum(update, x))
        if self.mlp_out_norm is not None:
            update = self.mlp_out_norm(update)
        return x.add_(update)
