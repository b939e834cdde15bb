"""Addends and penalties against the definition, token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flashtensors.kernels.penalties import Addends, Penalties, adjust_logits


def penalised_oracle(
    logits: list[float], prompt: list[int], answer: list[int], r: float, p: float, f: float
) -> list[float]:
    result = list(logits)
    for token in range(len(logits)):
        if token in prompt or token in answer:
            result[token] = result[token] / r if result[token] > 0 else result[token] * r
        result[token] -= f * answer.count(token) + p * (token in answer)
    return result


def test_penalties_follow_the_definition():
    rng = np.random.default_rng(0)
    sequences = [([1, 2, 2, 5], [5, 5, 7]), ([3], []), ([0, 1], [1]), ([9] * 5, [9] * 4 + [0])]
    factors = [(1.5, 0.5, 0.25), (2.0, 1.0, 1.0), (1.0, -2.0, 0.0), (0.5, 0.0, -0.75)]
    logits = rng.normal(size=(6, 10)).astype(np.float32) * 3
    rows = [4, 0, 5, 2]
    longest = max(len(prompt + answer) for prompt, answer in sequences)
    padded = [(prompt + answer + [8] * longest)[:longest] for prompt, answer in sequences]
    penalties = Penalties(
        rows_R=torch.tensor(rows),
        token_ids_RL=torch.tensor(padded),
        num_prompt_tokens_R=torch.tensor([len(prompt) for prompt, _ in sequences]),
        num_tokens_R=torch.tensor([len(prompt + answer) for prompt, answer in sequences]),
        repetition_R=torch.tensor([r for r, _, _ in factors]),
        presence_R=torch.tensor([p for _, p, _ in factors]),
        frequency_R=torch.tensor([f for _, _, f in factors]),
    )
    expected = logits.copy()
    for row, (prompt, answer), factor in zip(rows, sequences, factors, strict=True):
        expected[row] = penalised_oracle(logits[row].tolist(), prompt, answer, *factor)
    adjusted = torch.from_numpy(logits.copy())
    adjust_logits(adjusted, None, penalties)
    np.testing.assert_allclose(adjusted.numpy(), expected, rtol=1e-6, atol=1e-6)
    table, table_rows = torch.zeros((9, longest + 5), dtype=torch.int32), torch.tensor([7, 0, 3, 4])
    table[table_rows, :longest] = torch.tensor(padded, dtype=torch.int32)
    from_table = torch.from_numpy(logits.copy())
    adjust_logits(from_table, None, replace(penalties, token_ids_RL=table, token_rows_R=table_rows))
    assert torch.equal(from_table, adjusted)


def test_addends_add_up_and_mask_before_penalties():
    logits = torch.ones(2, 4)
    addends = Addends(
        rows_N=torch.tensor([0, 0, 1, 1]),
        token_ids_N=torch.tensor([1, 1, 2, 2]),
        values_N=torch.tensor([2.0, 3.0, 5.0, -torch.inf]),
    )
    penalties = Penalties(
        rows_R=torch.tensor([0, 1]),
        token_ids_RL=torch.tensor([[1], [2]]),
        num_prompt_tokens_R=torch.tensor([1, 1]),
        num_tokens_R=torch.tensor([1, 1]),
        repetition_R=torch.tensor([2.0, 2.0]),
        presence_R=torch.zeros(2),
        frequency_R=torch.zeros(2),
    )
    adjust_logits(logits, addends, penalties)
    assert logits.tolist() == [[1, 3, 1, 1], [1, 1, -torch.inf, 1]]
