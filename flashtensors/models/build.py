"""From a configuration and named weights to a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.architecture import ModelConfig
from ..kernels.activation import gelu_tanh_mul, silu_mul
from ..kernels.fp8_linear import dequantize
from ..kernels.linear import pack_weight
from ..kernels.moe_routing import Routing
from ..kernels.rope import inverse_frequencies, scale_linear, scale_llama3, yarn_attention_factor, yarn_frequencies
from .decoder import Decoder
from .family import Family
from .layers import Attention, DecoderLayer, Fp8Linear, GatedMlp, Linear, Projection, RmsNorm, SparseMlp

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": silu_mul, "gelu_pytorch_tanh": gelu_tanh_mul}


def build_decoder(config: ModelConfig, family: Family, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> Decoder:
    """A decoder over `weights`, which are named as in `decoder_layout`, of one dtype and on one device."""
    return _Builder(config, family, weights, dtype).decoder()


@dataclass(frozen=True)
class _Builder:
    config: ModelConfig
    family: Family
    weights: Mapping[str, Tensor]
    dtype: torch.dtype

    def decoder(self) -> Decoder:
        config = self.config
        embedding_VE = self.weights["embedding.weight"]
        local_theta = config.rope_local_theta
        return Decoder(
            embedding_VE=embedding_VE,
            embedding_scale=torch.tensor(config.embedding_scale, dtype=self.dtype).item(),
            layers=tuple(self._layer(layer) for layer in range(config.num_hidden_layers)),
            norm=self._norm("norm"),
            head=self._linear("embedding" if config.tie_word_embeddings else "head"),
            logit_softcap=config.final_logit_softcap,
            frequencies=_frequencies(config).to(embedding_VE.device),
            attention_factor=_attention_factor(config),
            local_frequencies=None
            if local_theta is None
            else inverse_frequencies(config.head_dim, local_theta).to(embedding_VE.device),
        )

    def _layer(self, layer: int) -> DecoderLayer:
        name, family = f"layers.{layer}", self.family
        is_sliding = bool(self.config.sliding_layers) and self.config.sliding_layers[layer]
        return DecoderLayer(
            attention_norm=self._norm(f"{name}.attention_norm"),
            attention=self._attention(f"{name}.attention", is_sliding=is_sliding),
            attention_out_norm=self._norm(f"{name}.attention_out_norm") if family.attention_out_norm else None,
            mlp_norm=self._norm(f"{name}.mlp_norm"),
            mlp=self._mlp(f"{name}.mlp", layer),
            mlp_out_norm=self._norm(f"{name}.mlp_out_norm") if family.mlp_out_norm else None,
        )

    def _attention(self, name: str, *, is_sliding: bool) -> Attention:
        config = self.config
        return Attention(
            qkv=self._projection(f"{name}.qkv"),
            out=self._projection(f"{name}.out"),
            q_norm=self._norm(f"{name}.q_norm") if config.qk_norm else None,
            k_norm=self._norm(f"{name}.k_norm") if config.qk_norm else None,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5 if config.query_scale is None else config.query_scale,
            sliding_window=config.sliding_window if is_sliding else None,
            softcap=config.attention_logit_softcap,
            has_local_rope=is_sliding,
        )

    def _mlp(self, name: str, layer: int) -> GatedMlp | SparseMlp:
        experts = self.config.experts
        if experts is not None and experts.layers[layer]:
            return SparseMlp(
                router=self._linear(f"{name}.router"),
                gate_up_XNE=self.weights[f"{name}.experts.gate_up.weight"].unflatten(0, (experts.num_experts, -1)),
                down_XEM=self.weights[f"{name}.experts.down.weight"].unflatten(0, (experts.num_experts, -1)),
                routing=Routing(num_experts_per_token=experts.num_experts_per_tok, renormalise=experts.norm_topk_prob),
            )
        return GatedMlp(
            gate_up=self._projection(f"{name}.gate_up"),
            down=self._projection(f"{name}.down"),
            activation=_ACTIVATIONS[self.config.hidden_act],
        )

    def _projection(self, name: str) -> Projection:
        """A product with a weight that may be fp8; on a CPU, where fp8 has no arithmetic, it is widened now."""
        scale = self.weights.get(f"{name}.scale")
        if scale is None:
            return self._linear(name)
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        if weight.device.type == "cpu":
            return Linear(weight=pack_weight(dequantize(weight, scale, self.dtype)), bias=bias)
        return Fp8Linear(weight=weight, scale=scale, bias=bias)

    def _linear(self, name: str) -> Linear:
        return Linear(weight=pack_weight(self.weights[f"{name}.weight"]), bias=self.weights.get(f"{name}.bias"))

    def _norm(self, name: str) -> RmsNorm:
        return RmsNorm(kernel=self.family.norm, weight=self.weights[f"{name}.weight"], eps=self.config.rms_norm_eps)


def _frequencies(config: ModelConfig) -> Tensor:
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "default":
        return frequencies
    if scaling.rope_type == "linear":
        return scale_linear(frequencies, factor=scaling.factor)
    if scaling.rope_type == "yarn":
        return yarn_frequencies(
            config.head_dim,
            config.rope_theta,
            factor=scaling.factor,
            original_max_position=scaling.original_max_position_embeddings,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            truncate=scaling.truncate,
        )
    assert scaling.rope_type == "llama3", f"rope type {scaling.rope_type}"
    return scale_llama3(
        frequencies,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position=scaling.original_max_position_embeddings,
    )


def _attention_factor(config: ModelConfig) -> float:
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return yarn_attention_factor(scaling.factor, mscale=scaling.mscale, mscale_all_dim=scaling.mscale_all_dim)
