"""Draws by parameters on the device: the door, its definition, and the generator of its uniforms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.sampling import sample, token_logprobs, token_logprobs_reference, uniform
from flashtensors.kernels.sampling_rows import SamplingRows, sample_rows, sample_rows_reference

from .sampling_oracle import SETTINGS, assert_draws_fit, make_rows, probabilities
from .test_sampling import chi_square_bound
from .tolerances import DEVICE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=generator) * 3).to(device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 40, 2000])
def test_draws_are_those_of_the_definition(vocab_size: int, dtype: torch.dtype) -> None:
    rows = make_rows([{**setting, "seed": seed} for setting in SETTINGS for seed in range(20)])
    logits = make_logits(20 * len(SETTINGS), vocab_size, dtype)
    token_ids, is_valid = sample_rows(logits, rows)
    expected, _ = sample_rows_reference(logits, rows)
    assert is_valid.all()
    assert (token_ids != expected).sum() <= 1  # sums in another order


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_definition_draws_with_exact_probabilities(setting: dict) -> None:
    num_draws = 5000
    logits = make_logits(1, 30)
    rows = make_rows([{**setting, "seed": seed} for seed in range(num_draws)])
    token_ids, _ = sample_rows_reference(logits.expand(num_draws, -1), rows)
    assert_draws_fit(token_ids.cpu().numpy(), probabilities(logits[0], setting))


def test_kernels_draw_as_the_definition() -> None:
    pytest.importorskip("triton")
    from flashtensors.kernels.sampling_launch import launch_sample

    rows = make_rows([{**setting, "seed": seed} for setting in SETTINGS for seed in range(2)])
    logits = make_logits(2 * len(SETTINGS), 700)
    assert torch.equal(launch_sample(logits, rows).token_ids_S, sample_rows_reference(logits, rows)[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_numbers_are_reported(bad: float) -> None:
    rows = make_rows([{}, {"top_p": 0.5}, {"temperature": 0.0}] * 2)
    logits = make_logits(6, 50)
    clean = sample_rows(logits, rows)[0]
    logits[:3, 7] = bad
    for draw in (sample_rows, sample_rows_reference):
        token_ids, is_valid = draw(logits, rows)
        assert is_valid.tolist() == [False] * 3 + [True] * 3
        assert token_ids.tolist() == [0, 0, 0, *clean[3:].tolist()]


@pytest.mark.parametrize("num_stop_ids", [0, 1, 3])
def test_a_row_ends_where_its_stop_id_is_drawn(num_stop_ids: int) -> None:
    logits, rows = make_logits(4, 50), make_rows([{"temperature": 0.0}, {"top_k": 5}, {}, {}])
    logits[3, 7] = torch.nan
    drawn = sample_rows(logits, rows)
    stops = torch.full((4, num_stop_ids), -1, dtype=torch.int32, device=DEVICE)
    if num_stop_ids:
        stops[:, -1] = drawn[0].int()
        stops[2, -1] += 1
    for draw in (sample_rows, sample_rows_reference):
        *same, is_finished = draw(logits, rows, stop_ids_SN=stops)
        assert all(torch.equal(x, y) for x, y in zip(same, drawn, strict=True))
        assert is_finished.tolist() == [num_stop_ids > 0, num_stop_ids > 0, False, False]


@pytest.mark.parametrize(
    "stops", [torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int32)]
)
def test_stop_ids_that_do_not_fit_are_named(stops: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="stop_ids_SN is"):
        sample_rows(make_logits(2, 30), SamplingRows.greedy(2, DEVICE), stop_ids_SN=stops.to(DEVICE))


def test_parameters_of_the_host_draw_the_same() -> None:
    rows = make_rows([{**setting, "seed": 3} for setting in SETTINGS])
    logits = make_logits(len(SETTINGS), 500)
    assert torch.equal(sample(logits, rows.to_draws(500))[0], sample_rows(logits, rows)[0])


def test_no_rows() -> None:
    token_ids, is_valid = sample_rows(torch.empty(0, 7, device=DEVICE), SamplingRows.greedy(0, DEVICE))
    assert token_ids.shape == is_valid.shape == (0,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature_S": torch.ones(2, dtype=torch.float64, device=DEVICE)}, "temperature_S is torch.float64"),
        ({"top_k_S": torch.ones(3, dtype=torch.int64, device=DEVICE)}, r"top_k_S is torch.int64 \[3\]"),
        ({"top_p_S": torch.ones(2, device=DEVICE)}, "top_p_S is torch.float32"),
        ({"seed_S": torch.ones(4, dtype=torch.int64, device=DEVICE)[::2]}, r"seed_S .* strides \(2,\)"),
    ],
)
def test_parameters_that_do_not_fit_are_named(change: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        sample_rows(make_logits(2, 30), replace(SamplingRows.greedy(2, DEVICE), **change))


def test_logits_that_do_not_fit_are_named() -> None:
    rows = SamplingRows.greedy(2, DEVICE)
    with pytest.raises(ConfigError, match=r"logits are torch.float64"):
        sample_rows(make_logits(2, 30).double(), rows)
    with pytest.raises(ConfigError, match="last must be 1"):
        sample_rows(make_logits(30, 2).T, rows)


GOLDEN = -0x61C8864680B583EB
"""What the generator adds for a position; a seed that differs by it must not give the stream shifted by one."""


@pytest.mark.parametrize(("next_seed", "next_position"), [(0, 1), (1, 0), (1, 1), (2**32, 0), (0, 2**32), (GOLDEN, -1)])
def test_neighbouring_draws_are_independent(next_seed: int, next_position: int) -> None:
    """Pairs of uniforms on a grid of 16 x 16 cells, for neighbours in seed, position, both, and high words."""
    seeds, positions = (x.flatten() for x in torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij"))
    first = uniform(seeds, positions)
    second = uniform(seeds + next_seed, positions + next_position)
    cells = ((first * 16).long() * 16 + (second * 16).long()).bincount(minlength=256)
    wanted = len(seeds) / 256
    assert ((cells - wanted) ** 2 / wanted).sum() < chi_square_bound(255)


def test_bits_of_a_draw_are_fair() -> None:
    bits = (uniform(torch.arange(50_000), torch.arange(50_000) % 7) * 2.0**52).long()
    for bit in range(52):
        num_ones = ((bits >> bit) & 1).sum().item()
        assert abs(num_ones - 25_000) < 5.5 * 50_000**0.5 / 2, bit


def test_logprobs_are_those_of_the_definition() -> None:
    logits, token_ids = make_logits(4, 300), torch.tensor([0, 299, 7, 130], device=DEVICE)
    actual = token_logprobs(logits, token_ids, 6)
    expected = token_logprobs_reference(logits, token_ids, 6)
    assert torch.equal(actual[1], expected[1])
    for values, wanted in zip(actual[::2], expected[::2], strict=True):
        np.testing.assert_allclose(values.cpu(), wanted.cpu(), rtol=0, atol=1e-5)
