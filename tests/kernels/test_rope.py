"""Rope against complex rotation in fp64, and bit for bit against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from flashtensors.errors import ConfigError
from flashtensors.kernels.rope import (
    apply_rope,
    apply_rope_reference,
    inverse_frequencies,
    rotation,
    scale_linear,
    scale_llama3,
    yarn_attention_factor,
    yarn_frequencies,
)

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
YARN = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
    {"factor": 2.5, "original_max_position_embeddings": 256, "beta_fast": 16.0, "beta_slow": 0.5},
    {"factor": 8.0, "original_max_position_embeddings": 1024, "beta_fast": 3.0, "beta_slow": 3.0},
    {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.75},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707},
    {"factor": 1.0, "original_max_position_embeddings": 4096},
]
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
def test_heads_may_turn_partly(dtype: torch.dtype) -> None:
    x, turns = torch.randn(5, 3, 80, dtype=dtype), rotation(torch.arange(5), inverse_frequencies(32, 10_000.0), dtype)
    for turn in (apply_rope, apply_rope_reference):
        out = turn(x, turns)
        assert torch.equal(out[..., :32], apply_rope(x[..., :32].contiguous(), turns))
        assert torch.equal(out[..., 32:], x[..., 32:])
    with pytest.raises(ConfigError, match="rotation is 32, but it must be of at most 16 elements"):
        apply_rope(x[..., :16], turns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3"])
def test_rope_equals_transformers(rope_type: str, dtype: torch.dtype) -> None:
    parameters = {"rope_type": rope_type, "rope_theta": 10_000.0}
    frequencies = inverse_frequencies(64, 10_000.0)
    if rope_type == "linear":
        parameters["factor"] = 4.0
        frequencies = scale_linear(frequencies, factor=4.0)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10_000.0), (128, 1_000_000.0), (80, 500_000.0)])
@pytest.mark.parametrize("scaling", YARN)
def test_yarn_equals_transformers(scaling: dict[str, Any], head_dim: int, theta: float, dtype: torch.dtype) -> None:
    config = Qwen3Config(head_dim=head_dim, rope_parameters={"rope_type": "yarn", "rope_theta": theta, **scaling})
    rope, positions = Qwen3RotaryEmbedding(config), torch.tensor([0, 1, 31, 300, 40_000, 131_071])
    cos, sin = rope(torch.empty(0, dtype=dtype), positions[None])
    names = {"original_max_position_embeddings": "original_max_position"}
    growth = ("attention_factor", "mscale", "mscale_all_dim")
    frequencies = yarn_frequencies(
        head_dim, theta, **{names.get(key, key): value for key, value in scaling.items() if key not in growth}
    )
    attention_factor = scaling.get("attention_factor") or yarn_attention_factor(
        scaling["factor"], mscale=scaling.get("mscale"), mscale_all_dim=scaling.get("mscale_all_dim")
    )
    turns = rotation(positions, frequencies, dtype, attention_factor=attention_factor)
    assert torch.equal(frequencies, rope.inv_freq)
    assert torch.equal(turns.cos_T1D[:, 0], cos[0])
    assert torch.equal(turns.sin_T1D[:, 0].abs(), sin[0].abs())
    q = torch.randn(6, 4, head_dim).to(dtype)
    assert torch.equal(apply_rope(q, turns), apply_rotary_pos_emb(q[None], q[None], cos, sin, unsqueeze_dim=2)[0][0])


def test_yarn_keeps_short_waves_stretches_long_ones_and_blends_between() -> None:
    plain = inverse_frequencies(128, 1_000_000.0)
    stretched = yarn_frequencies(128, 1_000_000.0, factor=4.0, original_max_position=32768)
    num_turns, ratio = 32768 * plain / (2 * math.pi), plain / stretched
    torch.testing.assert_close(ratio[num_turns > 40], torch.ones(int((num_turns > 40).sum())))
    torch.testing.assert_close(ratio[num_turns < 0.8], torch.full((int((num_turns < 0.8).sum()),), 4.0))
    blend = ratio[(num_turns > 1) & (num_turns < 32)]
    assert len(blend) > 10
    assert (blend.diff() > 0).all()


def test_scores_grow_as_yarn_measured() -> None:
    assert yarn_attention_factor(1.0) == 1.0
    assert yarn_attention_factor(4.0) == pytest.approx(1.138629436)
    assert yarn_attention_factor(40.0, mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert yarn_attention_factor(40.0, mscale=0.707, mscale_all_dim=1.0) == pytest.approx(1.260804 / 1.368888, abs=1e-6)


@pytest.mark.parametrize(
    ("scaling", "share_kept"),
    [
        ({"original_max_position": 4}, 0.0),  # no wave turns once
        ({"original_max_position": 2**31, "beta_fast": 1e-300, "beta_slow": 5e-324}, 1.0),
    ],
)
def test_yarn_of_extreme_contexts_keeps_or_stretches_every_wave(scaling: dict[str, Any], share_kept: float) -> None:
    ratio = yarn_frequencies(64, 10_000.0, factor=4.0, **scaling) / inverse_frequencies(64, 10_000.0)
    torch.testing.assert_close(ratio[1:], torch.full((31,), share_kept + (1 - share_kept) / 4))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("theta", 1.0),
        ("factor", 0.5),
        ("factor", math.nan),
        ("original_max_position", 0),
        ("beta_slow", 0.0),
        ("beta_fast", 0.5),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float) -> None:
    arguments: dict[str, Any] = {"theta": 10_000.0, "factor": 4.0, "original_max_position": 32, name: value}
    with pytest.raises(ConfigError, match=f"^{name} is {value}, but it must be"):
        yarn_frequencies(64, **arguments)
    if name == "factor":
        with pytest.raises(ConfigError, match=r"^factor"):
            yarn_attention_factor(value)
        with pytest.raises(ConfigError, match=r"^factor"):
            scale_linear(inverse_frequencies(64, 10_000.0), factor=min(value, 0.0))


@pytest.mark.parametrize("head_dim", [0, 63])
def test_frequencies_are_of_pairs(head_dim: int) -> None:
    with pytest.raises(ConfigError, match=f"head_dim is {head_dim}, but it must be even"):
        inverse_frequencies(head_dim, 10_000.0)
