"""Addends and penalties against the definition, token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.penalties import Addends, Penalties, add_bias, adjust_logits, penalise

from .tolerances import DEVICE


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
    sequences = [([1, 2, 2, 5], [5, 5, 7]), ([3], []), ([0, 1], [1]), ([9] * 5, [9] * 4 + [0]), ([], [])]
    factors = [(1.5, 0.5, 0.25), (2.0, 1.0, 1.0), (1.0, -2.0, 0.0), (0.5, 0.0, -0.75), (2.0, 1.0, 1.0)]
    logits = rng.normal(size=(6, 10)).astype(np.float32) * 3
    rows = [4, 0, 5, 2, 1]
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
    table, table_rows = torch.zeros((9, longest + 5), dtype=torch.int32), torch.tensor([7, 0, 3, 4, 2])
    table[table_rows, :longest] = torch.tensor(padded, dtype=torch.int32)
    from_table = torch.from_numpy(logits.copy())
    adjust_logits(from_table, None, replace(penalties, token_ids_RL=table, token_rows_R=table_rows))
    assert torch.equal(from_table, adjusted)
    nothing = replace(penalties, token_ids_RL=table, token_rows_R=table_rows, num_tokens_R=torch.zeros(5).long())
    adjust_logits(from_table, None, nothing)
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


def bias_on_device() -> dict[str, torch.Tensor]:
    return {
        "token_ids_SN": torch.tensor([[1, 9, -1], [-1, -1, -1], [3, 10, 2]], dtype=torch.int32, device=DEVICE),
        "values_SN": torch.tensor([[1.5, -2.0, 7.0], [7.0, 7.0, 7.0], [-torch.inf, 7.0, 4.0]], device=DEVICE),
        "stop_ids_SN": torch.tensor([[1, -1], [4, 12], [5, -1]], dtype=torch.int32, device=DEVICE),
        "position_S": torch.tensor([5, 5, 5], device=DEVICE),
        "min_length_S": torch.tensor([6, 6, 5], device=DEVICE),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_on_the_device_is_added_and_stop_tokens_wait(dtype: torch.dtype):
    logits = torch.ones(3, 10, dtype=dtype, device=DEVICE)
    add_bias(logits, **bias_on_device())
    expected = torch.ones(3, 10, dtype=dtype)
    expected[0, 1], expected[0, 9], expected[1, 4] = -torch.inf, -1.0, -torch.inf
    expected[2, 3], expected[2, 2] = -torch.inf, 5.0
    assert torch.equal(logits.cpu(), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"values_SN": None}, "values_SN is missing"),
        ({"min_length_S": None, "position_S": None}, "position_S, min_length_S is missing"),
        ({"token_ids_SN": torch.zeros(3, 3, dtype=torch.int64, device=DEVICE)}, "token_ids_SN is torch.int64"),
        ({"values_SN": torch.zeros(3, 2, device=DEVICE)}, "values_SN is"),
        ({"position_S": torch.zeros(2, dtype=torch.int64, device=DEVICE)}, "position_S is"),
    ],
)
def test_bias_that_does_not_fit_is_named(change: dict, named: str):
    with pytest.raises(ConfigError, match=named):
        add_bias(torch.ones(3, 10, device=DEVICE), **{**bias_on_device(), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows_R": torch.zeros(1, dtype=torch.int32)}, "penalties.rows_R is torch.int32"),
        ({"presence_R": torch.zeros(2)}, "penalties.presence_R is"),
        ({"token_ids_RL": torch.zeros(1, 4)}, "penalties.token_ids_RL is torch.float32"),
        ({"token_ids_RL": torch.zeros(4, 2, dtype=torch.int64).T[:1]}, "penalties.token_ids_RL .* strides"),
        ({"token_ids_RL": torch.zeros(2, 4, dtype=torch.int64)}, "give token_rows_R"),
        ({"token_rows_R": torch.zeros(2, dtype=torch.int64)}, "penalties.token_rows_R is"),
    ],
)
def test_penalties_that_do_not_fit_are_named(change: dict, named: str):
    penalties = Penalties(
        rows_R=torch.zeros(1, dtype=torch.int64),
        token_ids_RL=torch.zeros(1, 4, dtype=torch.int64),
        num_prompt_tokens_R=torch.tensor([2]),
        num_tokens_R=torch.tensor([4]),
        repetition_R=torch.ones(1),
        presence_R=torch.zeros(1),
        frequency_R=torch.zeros(1),
    )
    penalise(torch.ones(1, 3), penalties)
    with pytest.raises(ConfigError, match=named):
        penalise(torch.ones(1, 3), replace(penalties, **change))
