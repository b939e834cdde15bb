"""Published shapes of models with random weights on a GPU, and runners over them."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.checkpoint.config_fp8 import Fp8Config
from flashtensors.checkpoint.config_rope import RopeScaling
from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.models.registry import Model, build_model, weight_layout
from flashtensors.runner.capacity import block_size, choose_limits
from flashtensors.runner.device_runner import DeviceRunner
from flashtensors.runner.make import make_runner
from flashtensors.runner.workspace import Workspace

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16

_QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "qk_norm": True,
}
SHAPES = {
    "qwen3-0.6b": ModelConfig(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": ModelConfig(
        **_QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32
    ),
    "llama-3.2-1b": ModelConfig(
        model_type="llama",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
    ),
}


def with_fp8_weights(config: ModelConfig) -> ModelConfig:
    """The shape with projections in fp8, as `flash pull --quantize fp8` stores them."""
    quantization = Fp8Config(is_blockwise=False, scale_name="weight_scale")
    return msgspec.structs.replace(config, quantization=quantization)


def make_model(config: ModelConfig) -> Model:
    """The shape with random weights; norms are ones."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = {}
    for weight in weight_layout(config).weights:
        tensor = torch.ones(weight.shape, device=DEVICE, dtype=DTYPE)
        if weight.name.endswith(".scale"):
            tensor = torch.full(weight.shape, 0.02 / 60, device=DEVICE)
        elif weight.dtype is not None:
            tensor = tensor.normal_(0, 60, generator=generator).to(FP8_DTYPE)
        elif len(weight.shape) > 1:
            tensor = tensor.normal_(0, 0.02, generator=generator)
        weights[weight.name] = tensor
    return build_model(config, weights, dtype=DTYPE)


def make_bench_runner(
    model: Model,
    config: ModelConfig,
    *,
    max_num_seqs: int = 1024,
    max_model_len: int = 4096,
    memory_share: float = 0.9,
    enforce_eager: bool = False,
    has_groups: bool = True,
    kv_dtype: torch.dtype = DTYPE,
) -> DeviceRunner:
    """A runner whose KV cache takes what `memory_share` of the device leaves beside the weights."""
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    limits = choose_limits(
        config,
        dtype=kv_dtype,
        kv_cache_bytes=int(free_bytes - (1 - memory_share) * total_bytes),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_tokens_per_step=8192,
        block_size=block_size(DEVICE),
        device=DEVICE,
    )
    if not has_groups:
        limits = msgspec.structs.replace(limits, group_min_members=0)
    return make_runner(
        model,
        config,
        limits=limits,
        device=DEVICE,
        dtype=DTYPE,
        workspace=Workspace(DEVICE),
        kv_dtype=kv_dtype,
        enforce_eager=enforce_eager,
    )
