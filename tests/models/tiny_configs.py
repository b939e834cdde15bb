"""Tiny models of every architecture, as transformers configures them."""

from __future__ import annotations

from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SMALL = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
"""As the cards of Qwen2.5 and Qwen3 have it, on a context that short texts leave."""


def heads(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}


DENSE: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, **heads(4, 4, 16)),
    "llama_tied_llama3_rope": LlamaConfig(
        **SMALL, **heads(4, 1, 16), tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "llama_biases_linear_rope": LlamaConfig(
        **SMALL, **heads(4, 2, 24), attention_bias=True, mlp_bias=True, rope_parameters=LINEAR_ROPE
    ),
    "mistral_window": MistralConfig(**SMALL, **heads(4, 2, 16), sliding_window=9),
    "mistral_long_window": MistralConfig(**SMALL, **heads(4, 1, 32), sliding_window=40, tie_word_embeddings=True),
    "mistral_no_window": MistralConfig(**SMALL, **heads(2, 2, 16), sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "qwen2_tied": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2_some_windows": Qwen2Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=11,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SMALL, **heads(4, 2, 32)),
    "qwen3_tied": Qwen3Config(**SMALL, **heads(4, 1, 16), tie_word_embeddings=True),
    "qwen3_biases": Qwen3Config(**SMALL, **heads(4, 4, 8), attention_bias=True, rope_parameters=LINEAR_ROPE),
    "qwen2_yarn": Qwen2Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, rope_parameters=YARN_ROPE
    ),
    "qwen3_yarn": Qwen3Config(
        **SMALL,
        **heads(4, 2, 32),
        max_position_embeddings=40,
        rope_parameters={**YARN_ROPE, "beta_fast": 4.0, "beta_slow": 0.25, "truncate": False},
    ),
    "qwen3_yarn_attention_factor": Qwen3Config(
        **SMALL, **heads(4, 1, 16), rope_parameters={**YARN_ROPE, "attention_factor": 1.7}
    ),
    "llama_yarn_mscale": LlamaConfig(
        **SMALL, **heads(4, 2, 24), rope_parameters={**YARN_ROPE, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 2.0}
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL, **heads(4, 1, 256), sliding_window=9, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "gemma3_wide_window": Gemma3TextConfig(
        **SMALL,
        **heads(4, 2, 32),
        sliding_window=33,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "gemma3_softcap_untied": Gemma3TextConfig(
        **SMALL,
        **heads(2, 2, 64),
        sliding_window=16,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
}
SPARSE: dict[str, PretrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, **heads(4, 2, 32), num_experts=12, num_experts_per_tok=4, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3_moe_raw_weights_some_layers": Qwen3MoeConfig(
        **SMALL,
        **heads(4, 1, 16),
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        tie_word_embeddings=True,
        rope_parameters=LINEAR_ROPE,
    ),
    "qwen3_moe_sparse_step_window": Qwen3MoeConfig(
        **SMALL,
        **heads(4, 4, 8),
        num_experts=8,
        num_experts_per_tok=1,
        moe_intermediate_size=56,
        decoder_sparse_step=2,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=13,
    ),
    "qwen3_moe_yarn": Qwen3MoeConfig(
        **SMALL,
        **heads(4, 2, 16),
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        rope_parameters=YARN_ROPE,
    ),
    "mixtral": MixtralConfig(**SMALL, **heads(4, 2, 16), num_local_experts=4),
    "mixtral_window": MixtralConfig(**SMALL, **heads(4, 1, 32), num_local_experts=8, sliding_window=9),
    "mixtral_tied_three_of_three": MixtralConfig(
        **SMALL, **heads(2, 2, 16), num_local_experts=3, num_experts_per_tok=3, tie_word_embeddings=True
    ),
}
CONFIGS = DENSE | SPARSE
