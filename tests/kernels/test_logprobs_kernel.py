"""Logprobs from block sums against log-softmax in fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.logprobs_kernel import launch_token_logprobs
from flashtensors.kernels.sampling_launch import launch_sample

from .sampling_oracle import make_rows
from .tolerances import DEVICE, DTYPES


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=generator) * 4).to(device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab_size", "num_top"), [(1, 1), (50, 5), (400, 20), (400, 0)])
def test_logprobs_are_log_softmax(vocab_size: int, num_top: int, dtype: torch.dtype) -> None:
    logits = make_logits(3, vocab_size, dtype)  # 16-bit logits have equal ones among the likeliest
    token_ids = torch.tensor([0, vocab_size // 2, vocab_size - 1], device=DEVICE)
    expected = torch.log_softmax(logits.double(), -1)
    ordered, order = expected.sort(dim=1, descending=True, stable=True)
    chosen, top_ids, top = launch_token_logprobs(logits, token_ids, num_top)
    torch.testing.assert_close(chosen.double(), expected.gather(1, token_ids[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(top.double(), ordered[:, :num_top], rtol=0, atol=1e-5)
    assert torch.equal(top_ids, order[:, :num_top])


def test_rows_get_what_they_ask_for_from_the_sums_of_sampling() -> None:
    logits = make_logits(4, 300, torch.float32)
    rows = make_rows([{"temperature": 0.5}, {"temperature": 0.0}, {"top_k": 3}, {}])
    wanted = torch.tensor([2, 0, -1, 5], dtype=torch.int32, device=DEVICE)
    sampled = launch_sample(logits, rows, num_logprobs_S=wanted)
    expected = torch.log_softmax(logits.double(), -1)
    chosen, top_ids, top = launch_token_logprobs(
        logits, sampled.token_ids_S, 5, num_logprobs_S=wanted, stats=sampled.stats
    )
    for row, num_top in ((0, 2), (1, 0), (3, 5)):
        assert abs(chosen[row] - expected[row, sampled.token_ids_S[row]]) < 1e-5
        assert torch.equal(top_ids[row, :num_top], expected[row].topk(num_top)[1])
        torch.testing.assert_close(top[row, :num_top].double(), expected[row].topk(num_top)[0], rtol=0, atol=1e-5)


def test_sums_without_plain_ones_are_made_again() -> None:
    logits = make_logits(2, 300, torch.float32)
    sampled = launch_sample(logits, make_rows([{"temperature": 0.5}] * 2))
    chosen, _, _ = launch_token_logprobs(logits, sampled.token_ids_S, 0, stats=sampled.stats)
    expected = torch.log_softmax(logits.double(), -1).gather(1, sampled.token_ids_S[:, None])[:, 0]
    torch.testing.assert_close(chosen.double(), expected, rtol=0, atol=1e-5)


def test_fewer_possible_tokens_than_asked_for() -> None:
    logits = torch.full((1, 300), -torch.inf, device=DEVICE)
    logits[0, [200, 3]] = torch.tensor([1.0, 0.5], device=DEVICE)
    _, top_ids, top = launch_token_logprobs(logits, torch.tensor([200], device=DEVICE), 4)
    assert top_ids.tolist() == [[200, 3, 0, 0]]
    assert top[0, 2:].tolist() == [-torch.inf] * 2


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert launch_token_logprobs(torch.empty(0, 9, device=DEVICE), empty, 3)[2].shape == (0, 3)
