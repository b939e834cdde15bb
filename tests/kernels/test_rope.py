"""Rope against complex rotation in fp64, and bit for bit against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from flashtensors.kernels.rope import apply_rope, apply_rope_reference, inverse_frequencies, rotation, scale_llama3

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("head_dim", [2, 64, 80, 256])
def test_rope_turns_pairs_in_the_complex_plane(head_dim: int) -> None:
    positions, x = torch.tensor([0, 1, 17, 900]), torch.randn(4, 3, head_dim)
    out = apply_rope(x, rotation(positions, inverse_frequencies(head_dim, 10_000.0), torch.float32))
    pairs = torch.complex(*x.double().chunk(2, -1))
    exponents = torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim
    angles = positions[:, None, None] * 10_000.0**-exponents
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(out.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_equals_its_reference_on_strided_heads(dtype: torch.dtype) -> None:
    qkv = torch.randn(5, 8, 64, dtype=dtype)
    before = qkv.clone()
    turns = rotation(torch.arange(5), inverse_frequencies(64, 500_000.0), dtype)
    assert torch.equal(apply_rope(qkv[:, 2:5], turns), apply_rope_reference(qkv[:, 2:5].contiguous(), turns))
    assert torch.equal(qkv, before)
    assert apply_rope(qkv[:0], rotation(torch.arange(0), inverse_frequencies(64, 1e4), dtype)).shape == (0, 8, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3"])
def test_rope_equals_transformers(rope_type: str, dtype: torch.dtype) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 10_000.0}
    frequencies = inverse_frequencies(64, 10_000.0)
    if rope_type == "linear":
        parameters["factor"] = 4.0
        frequencies = frequencies / 4.0
    if rope_type == "llama3":
        parameters |= LLAMA3
        names = {"original_max_position_embeddings": "original_max_position"}
        frequencies = scale_llama3(frequencies, **{names.get(key, key): value for key, value in LLAMA3.items()})  # pyright: ignore
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters=parameters, max_position_embeddings=4096
    )
    positions, q, k = (
        torch.tensor([0, 5, 300, 4000]),
        torch.randn(4, 4, 64, dtype=dtype),
        torch.randn(4, 2, 64).to(dtype),
    )
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    theirs = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    turns = rotation(positions, frequencies, dtype)
    assert torch.equal(apply_rope(q, turns), theirs[0][0])
    assert torch.equal(apply_rope(k, turns), theirs[1][0])


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    wavelengths = torch.tensor([10.0, 63.0, 128.0, 257.0, 5000.0])
    scaled = scale_llama3(
        2 * math.pi / wavelengths, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=256
    )
    stretch = 2 * math.pi / scaled / wavelengths
    torch.testing.assert_close(stretch[[0, 1, 3, 4]], torch.tensor([1.0, 1.0, 8.0, 8.0]))
    assert 1.0 < stretch[2] < 8.0
