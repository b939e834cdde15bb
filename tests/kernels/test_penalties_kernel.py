"""Bias and penalties in place against the definitions, token by token in Python."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels import penalties_kernel
from flashtensors.kernels.penalties import Penalties, add_bias_reference, penalise_reference
from flashtensors.kernels.penalties_kernel import launch_add_bias, launch_penalise

from .launch_options import launch_options
from .tolerances import DEVICE, DTYPES, assert_near


def expected_row(logits: torch.Tensor, prompt: list[int], answer: list[int], factors: tuple) -> torch.Tensor:
    repetition, presence, frequency = factors
    out = logits.double().clone()
    for token in set(prompt + answer):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        out[token] -= frequency * answer.count(token) + presence * (token in answer)
    return out


FACTORS = [(1.0, 0.0, 0.0), (1.5, 0.0, 0.0), (1.0, 0.5, 0.25), (0.7, -1.0, 2.0), (1.2, 0.3, -0.5), (2.0, 1.0, 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_programs", [1, 3, None])
def test_tokens_that_occur_are_penalised_once(num_programs: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab_size, length = 60, 40
    logits = (torch.randn(7, vocab_size, generator=generator) * 4).to(device=DEVICE, dtype=dtype)
    tokens = torch.randint(0, vocab_size, (9, length), generator=generator, dtype=torch.int32)
    rows, token_rows = [6, 0, 3, 4, 2, 5], [8, 1, 0, 5, 3, 2]
    num_prompt, num_tokens = [10, 0, 20, 5, 39, 0], [30, 7, 20, 40, 40, 0]
    expected = logits.double()
    for index, row in enumerate(rows):
        sequence = tokens[token_rows[index], : num_tokens[index]].tolist()
        prompt, answer = sequence[: num_prompt[index]], sequence[num_prompt[index] :]
        expected[row] = expected_row(logits[row], prompt, answer, FACTORS[index])
    factors = torch.tensor(FACTORS, device=DEVICE).T.contiguous()
    penalties = Penalties(
        rows_R=torch.tensor(rows, device=DEVICE),
        token_ids_RL=tokens.to(DEVICE),
        num_prompt_tokens_R=torch.tensor(num_prompt, device=DEVICE),
        num_tokens_R=torch.tensor(num_tokens, device=DEVICE),
        repetition_R=factors[0],
        presence_R=factors[1],
        frequency_R=factors[2],
        token_rows_R=torch.tensor(token_rows, device=DEVICE),
    )
    counts = None if num_programs is None else torch.zeros(num_programs, vocab_size, dtype=torch.int32, device=DEVICE)
    by_reference = logits.clone()
    penalise_reference(by_reference, penalties)
    assert_near(by_reference, expected, "two roundings")
    launch_penalise(logits, penalties, counts_PV=counts)
    assert_near(logits, expected, "two roundings")
    assert counts is None or not counts.any()


def test_a_long_sequence_of_one_token() -> None:
    logits = torch.ones(1, 9, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    penalties = Penalties(
        rows_R=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        token_ids_RL=torch.full((1, 3000), 4, device=DEVICE),
        num_prompt_tokens_R=torch.tensor([1000], device=DEVICE),
        num_tokens_R=torch.tensor([3000], device=DEVICE),
        repetition_R=one * 2,
        presence_R=one * 0.5,
        frequency_R=one * 0.25,
    )
    launch_penalise(logits, penalties)
    assert logits[0].tolist() == [1.0] * 4 + [0.5 - 0.5 - 500.0] + [1.0] * 4


def test_bias_is_added_and_stop_tokens_wait() -> None:
    logits, by_reference = torch.zeros(3, 10, device=DEVICE), torch.zeros(3, 10, device=DEVICE)
    bias = {
        "token_ids_SN": torch.tensor([[1, 9, -1], [-1, -1, -1], [3, 10, 2]], dtype=torch.int32, device=DEVICE),
        "values_SN": torch.tensor([[1.5, -2.0, 7.0], [7.0, 7.0, 7.0], [0.5, 7.0, 4.0]], device=DEVICE),
        "stop_ids_SN": torch.tensor([[1, -1], [4, 12], [5, -1]], dtype=torch.int32, device=DEVICE),
        "position_S": torch.tensor([5, 5, 5], device=DEVICE),
        "min_length_S": torch.tensor([6, 6, 5], device=DEVICE),
    }
    launch_add_bias(logits, **bias)
    expected = torch.zeros(3, 10)
    expected[0, 1], expected[0, 9], expected[1, 4] = -torch.inf, -2.0, -torch.inf
    expected[2, 3], expected[2, 2] = 0.5, 4.0
    assert torch.equal(logits.cpu(), expected)
    add_bias_reference(by_reference, **bias)
    assert torch.equal(by_reference, logits)


def test_batches_of_any_number_of_entries_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def options_of(num_entries: int, num_stop_ids: int) -> dict[str, int]:
        def launch() -> None:
            launch_add_bias(
                torch.zeros(2, 9, device=DEVICE),
                token_ids_SN=torch.zeros(2, num_entries, dtype=torch.int32, device=DEVICE),
                values_SN=torch.zeros(2, num_entries, device=DEVICE),
                stop_ids_SN=torch.zeros(2, num_stop_ids, dtype=torch.int32, device=DEVICE),
                position_S=torch.zeros(2, dtype=torch.int64, device=DEVICE),
                min_length_S=torch.zeros(2, dtype=torch.int64, device=DEVICE),
            )

        return launch_options(monkeypatch, penalties_kernel, "_add_bias", launch)

    assert options_of(5, 3) == options_of(8, 4) == options_of(7, 3)
    assert options_of(5, 3) != options_of(9, 3)
