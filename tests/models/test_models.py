"""Every architecture against transformers: logits through the paged cache, and greedy text."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from .tiny_configs import CONFIGS, DENSE, SMALL
from .transformers_oracle import PagedModel, make_config, make_oracle, make_paged

NUM_TOKENS = 72
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
every_dense_config = pytest.mark.parametrize("config", DENSE.values(), ids=DENSE.keys())
"""Rounding to bfloat16 may choose another expert, and then no error has a bound."""


def random_tokens(num_tokens: int, *, seed: int = 0) -> list[int]:
    return torch.randint(3, SMALL["vocab_size"], (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def chunked_logits(paged: PagedModel, tokens: list[int]) -> torch.Tensor:
    """Prefill in two chunks, an append of two tokens, and decodes."""
    bounds = [0, 21, 50, 52, *range(53, len(tokens) + 1)]
    return torch.cat([paged.step({0: tokens[start:end]}) for start, end in itertools.pairwise(bounds)])


@torch.inference_mode()
@every_config
def test_logits_equal_those_of_transformers(config: PretrainedConfig) -> None:
    oracle, tokens = make_oracle(config), random_tokens(NUM_TOKENS)
    logits = chunked_logits(make_paged(oracle), tokens)
    expected = oracle(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.inference_mode()
@every_config
def test_greedy_text_equals_that_of_transformers(config: PretrainedConfig) -> None:
    oracle, prompt = make_oracle(config), random_tokens(20, seed=1)
    expected = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    paged, generated = make_paged(oracle), []
    logits = paged.step({0: prompt}, sample_rows=[len(prompt) - 1])
    for _ in range(64):
        generated.append(int(logits[0].argmax()))
        logits = paged.step({0: generated[-1:]})
    assert len(set(expected)) > 1
    assert generated == expected


@torch.inference_mode()
@every_config
def test_a_mixed_batch_computes_each_sequence_as_if_alone(config: PretrainedConfig) -> None:
    oracle = make_oracle(config)
    paged = make_paged(oracle)
    first, second, third = (random_tokens(48, seed=seed) for seed in (1, 2, 3))
    expected = oracle(torch.tensor([first, second, third])).logits
    paged.step({0: first[:30], 2: third[:5]}, sample_rows=[])
    logits = paged.step({1: second[:40], 0: first[30:31], 2: third[5:17]}, sample_rows=[40, 52, 3, 39])
    torch.testing.assert_close(
        logits, torch.stack([expected[0, 30], expected[2, 16], expected[1, 3], expected[1, 39]]), rtol=0, atol=1e-4
    )
    logits = paged.step({2: third[17:18], 0: first[31:32], 1: second[40:41]})
    torch.testing.assert_close(
        logits, torch.stack([expected[2, 17], expected[0, 31], expected[1, 40]]), rtol=0, atol=1e-4
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama_tied_llama3_rope", "qwen2_yarn", "qwen3_yarn", "llama_yarn_mscale"])
def test_tables_of_positions_hold_the_angles_that_transformers_computes(name: str) -> None:
    oracle = make_oracle(CONFIGS[name])
    cos, sin = oracle.model.rotary_emb(torch.empty(0), torch.arange(200)[None])
    table = make_paged(oracle).model.make_rotations(200).plain
    assert torch.equal(table.cos_T1D[:, 0], cos[0])
    assert torch.equal(table.sin_T1D[:, 0].chunk(2, -1)[1], sin[0].chunk(2, -1)[1])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen2", "qwen3", "qwen3_yarn", "gemma3"])
def test_bfloat16_is_as_close_to_fp32_as_transformers_is(name: str) -> None:
    tokens = random_tokens(NUM_TOKENS)
    exact = make_oracle(CONFIGS[name], dtype=torch.bfloat16).float()
    oracle = make_oracle(CONFIGS[name], dtype=torch.bfloat16)
    expected = exact(torch.tensor([tokens])).logits[0]
    logits = chunked_logits(make_paged(oracle, dtype=torch.bfloat16), tokens)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).pow(2).mean().sqrt()
    their_error = (oracle(torch.tensor([tokens])).logits[0].float() - expected).pow(2).mean().sqrt()
    assert error <= 1.25 * their_error


every_path = pytest.mark.parametrize("is_fused", [False, True], ids=["parts", "fused"])


def skip_narrow_heads(oracle: PreTrainedModel, is_fused: bool) -> None:
    if is_fused and make_config(oracle).head_dim < 16:
        pytest.skip("matrix units take heads of 16 elements or more")


@pytest.mark.gpu
@torch.inference_mode()
@every_path
@every_config
def test_a_gpu_equals_transformers(config: PretrainedConfig, is_fused: bool) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32, "torch's default has changed: fp32 products would be rounded"
    oracle, tokens = make_oracle(config, device="cuda"), random_tokens(NUM_TOKENS)
    skip_narrow_heads(oracle, is_fused)
    logits = chunked_logits(make_paged(oracle, device="cuda", is_fused=is_fused), tokens)
    expected = oracle(torch.tensor([tokens], device="cuda")).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
@torch.inference_mode()
@every_path
@every_dense_config
def test_a_gpu_in_bfloat16_is_as_close_to_fp32_as_transformers_is(config: PretrainedConfig, is_fused: bool) -> None:
    tokens = random_tokens(NUM_TOKENS)
    exact = make_oracle(config, dtype=torch.bfloat16, device="cuda").float()
    oracle = make_oracle(config, dtype=torch.bfloat16, device="cuda")
    token_ids = torch.tensor([tokens], device="cuda")
    expected = exact(token_ids).logits[0]
    skip_narrow_heads(oracle, is_fused)
    logits = chunked_logits(make_paged(oracle, dtype=torch.bfloat16, device="cuda", is_fused=is_fused), tokens)
    error = (logits.float() - expected).pow(2).mean().sqrt()
    their_error = (oracle(token_ids).logits[0].float() - expected).pow(2).mean().sqrt()
    assert error <= 1.5 * their_error
