"""Sampling against an fp64 oracle written from the definitions, and against exact probabilities by chi-square."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.sampling import Draws, sample, token_logprobs, uniform

from .tolerances import DEVICE

NO_TRUNCATION = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def make_draws(rows: list[dict], *, first_row: int = 0, position: int = 0) -> Draws:
    """Draws for consecutive rows from `{"temperature", "top_k", "top_p", "min_p", "seed"}`, all of one kind."""
    rows = [{**NO_TRUNCATION, "temperature": 1.0, "seed": 0, **row} for row in rows]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=dtype)

    return Draws.of(
        rows=np.arange(first_row, first_row + len(rows)),
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int64),
        top_p=column("top_p", np.float64),
        min_p=column("min_p", np.float32),
        seed=column("seed", np.int64),
        position=np.full(len(rows), position),
        device=torch.device("cpu"),
    )


def oracle_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution of one row, from the definitions: sort, truncate three times, renormalise."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = order[:top_k] if top_k else order
    goal, total, nucleus = top_p * sum(weights[kept]), 0.0, []
    for token in kept:
        nucleus.append(token)
        total += weights[token]
        if total >= goal and top_p < 1:
            break
    kept = [token for token in nucleus if weights[token] >= min_p * weights.max()]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights[kept] / sum(weights[kept])
    return probabilities


def empirical_counts(logits_V: torch.Tensor, row: dict, num_draws: int) -> np.ndarray:
    """How often each token is drawn by seeds 0 … num_draws - 1."""
    draws = make_draws([{**row, "seed": seed} for seed in range(num_draws)], position=3)
    token_ids, is_valid = sample(logits_V.expand(num_draws, -1).contiguous(), [draws])
    assert is_valid.all()
    return np.bincount(token_ids.numpy(), minlength=len(logits_V))


def chi_square_bound(degrees: int) -> float:
    """A value that chi-square exceeds with probability below 1e-6 (Wilson-Hilferty approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.9 * math.sqrt(2 / (9 * degrees))) ** 3


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"min_p": 0.2},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"top_k": 12, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.05, "temperature": 0.7},
    {"top_p": 0.95, "min_p": 0.3, "temperature": 1.7},
]


@pytest.mark.parametrize("row", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", [40, 256, 300])
def test_frequencies_are_the_exact_probabilities(row: dict, vocab_size: int):
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    expected = oracle_probabilities(logits.numpy(), **{"temperature": 1.0, **NO_TRUNCATION, **row})
    num_draws = 20_000
    counts = empirical_counts(logits, row, num_draws)
    assert not counts[expected == 0].any(), "a token outside the support was drawn"
    is_common = expected * num_draws > 5
    observed = np.append(counts[is_common], counts[~is_common].sum())
    wanted = np.append(expected[is_common], expected[~is_common].sum()) * num_draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    assert statistic <= (chi_square_bound(len(wanted) - 1) if len(wanted) > 1 else 0.0)


@pytest.mark.parametrize("seed", range(6))
def test_support_of_random_settings(seed: int):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=3000).astype(np.float32) * rng.choice([0.5, 1, 4]))
    row = {
        "temperature": float(rng.uniform(0.5, 2)),
        "top_k": int(rng.choice([0, 3, 700])),
        "top_p": float(rng.choice([0.3, 0.9, 0.999])),
        "min_p": float(rng.choice([0, 0.1])),
    }
    expected = oracle_probabilities(logits.numpy(), **row)
    counts = empirical_counts(logits, row, 2000)
    allowed_error = 1 if row["top_k"] == 0 else 0  # fp32 weights may move the edge of a nucleus by one token
    assert (counts[expected == 0] > 0).sum() <= allowed_error
    likely = expected > 0.02
    assert (counts[likely] > 0).all()


def test_equal_logits_are_taken_by_id():
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 3.0])
    assert set(empirical_counts(logits, {"top_k": 2}, 200).nonzero()[0]) == {1, 2}
    assert set(empirical_counts(logits, {"top_p": 0.4}, 200).nonzero()[0]) == {1, 2}
    assert sample(logits[None], [])[0].item() == 1


@pytest.mark.parametrize("row", [{"top_k": 3}, {"top_p": 0.1}, {"top_k": 1000, "top_p": 0.9}])
def test_ties_beyond_the_first_candidates(row: dict):
    logits = torch.zeros(20_000)
    logits[17] = 0.5
    expected = oracle_probabilities(logits.numpy(), **{"temperature": 1.0, **NO_TRUNCATION, **row})
    counts = empirical_counts(logits, row, 64)
    assert not counts[expected == 0].any()
    if row == {"top_k": 3}:
        assert counts.nonzero()[0].tolist() == [0, 1, 17]


def test_a_draw_depends_only_on_its_row_seed_and_position():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(8, 5000, generator=generator) * 3).bfloat16().float()
    for kind in (
        [{"temperature": 0.8}] * 8,
        [{"top_p": 0.9}, {"top_k": 40}, {"top_k": 2000, "top_p": 0.99}, {"top_p": 0.5}] * 2,
    ):
        rows = [{**row, "seed": 100 + index} for index, row in enumerate(kind)]
        together, _ = sample(logits, [make_draws(rows, position=9)])
        for index, row in enumerate(rows):
            alone, _ = sample(logits[index : index + 1], [make_draws([row], position=9)])
            assert alone.item() == together[index].item()
        later, _ = sample(logits, [make_draws(rows, position=10)])
        assert not torch.equal(later, together)


def test_kinds_of_rows_in_one_batch():
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    plain = make_draws([{"seed": 1}, {"seed": 2}], first_row=1)
    truncated = make_draws([{"seed": 3, "top_k": 3}, {"seed": 4, "top_p": 0.5}], first_row=4)
    token_ids, is_valid = sample(logits, [plain, truncated])
    assert is_valid.all()
    for row in (0, 3):
        assert token_ids[row] == logits[row].argmax()
    assert torch.equal(token_ids[1:3], sample(logits[1:3], [replace(plain, rows_R=torch.arange(2))])[0])
    assert torch.equal(token_ids[4:6], sample(logits[4:6], [replace(truncated, rows_R=torch.arange(2))])[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_numbers_are_reported_and_harm_no_other(bad: float):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    clean = logits.clone()
    logits[[0, 2, 4], 7] = bad
    groups = [make_draws([{"seed": 1}] * 2, first_row=2), make_draws([{"top_k": 3}] * 2, first_row=4)]
    token_ids, is_valid = sample(logits, groups)
    assert is_valid.tolist() == [False, True] * 3
    assert torch.equal(token_ids[1::2], sample(clean, groups)[0][1::2])
    assert not token_ids[0::2].any()


def test_a_row_without_any_allowed_token_is_reported():
    logits = torch.full((3, 10), -torch.inf)
    groups = [make_draws([{}], first_row=1), make_draws([{"top_p": 0.5}], first_row=2)]
    assert not sample(logits, groups)[1].any()


def test_masked_tokens_are_never_drawn():
    logits = torch.zeros(10)
    logits[::2] = -torch.inf
    assert not empirical_counts(logits, {}, 500)[::2].any()
    assert not empirical_counts(logits, {"top_p": 0.99}, 500)[::2].any()


def test_tiny_and_huge_temperatures():
    logits = torch.tensor([0.0, 1.0, 0.5])
    assert empirical_counts(logits, {"temperature": 1e-40}, 50).tolist() == [0, 50, 0]
    assert (empirical_counts(logits, {"temperature": 100.0}, 300) > 60).all()


def test_no_rows():
    token_ids, is_valid = sample(torch.empty(0, 7), [])
    assert token_ids.shape == is_valid.shape == (0,)


def splitmix64_oracle(state: int) -> int:
    """The finaliser of SplitMix64 on Python's own integers."""
    mask = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_uniforms_are_splitmix64(seed: int):
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    stream = splitmix64_oracle((seed + golden) & mask)
    expected = [(splitmix64_oracle((stream + (i + 1) * golden) & mask) >> 12) / 2**52 for i in range(5)]
    assert uniform(torch.full((5,), seed), torch.arange(5)).tolist() == expected


def test_splitmix64_is_the_published_one():
    # First output of the generator with state 0, from the reference implementation.
    assert splitmix64_oracle(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_uniforms_are_uniform_over_seeds_and_positions():
    for seeds, positions in (
        (torch.arange(50_000), torch.zeros(50_000)),
        (torch.full((50_000,), 7), torch.arange(50_000)),
    ):
        counts = torch.histc(uniform(seeds, positions.long()).float(), 100, 0, 1)
        assert ((counts - 500) ** 2 / 500).sum() < chi_square_bound(99)


def test_logprobs_are_log_softmax():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.log_softmax(logits.double(), -1)
    chosen, top_ids, top = token_logprobs(logits, torch.tensor([4, 0, 49]), 5)
    torch.testing.assert_close(chosen.double(), expected[range(3), [4, 0, 49]], rtol=0, atol=1e-5)
    torch.testing.assert_close(top.double(), expected.topk(5)[0], rtol=0, atol=1e-5)
    assert torch.equal(top_ids, expected.topk(5)[1])
    assert token_logprobs(logits, torch.tensor([4, 0, 49]), 0)[2].shape == (3, 0)
    assert token_logprobs(logits.half(), torch.tensor([4, 0, 49]), 5)[2].dtype == torch.float32


def test_logprobs_that_cannot_be_are_refused() -> None:
    logits, token_ids = torch.zeros(2, 4, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for num_top in (-1, 5):
        with pytest.raises(ConfigError, match=f"num_top is {num_top}, but it must be from 0 to 4"):
            token_logprobs(logits, token_ids, num_top)
    for wrong in (token_ids.int(), token_ids[:1], token_ids.to("meta")):
        with pytest.raises(ConfigError, match="token_ids_R is"):
            token_logprobs(logits, wrong, 1)
    with pytest.raises(ConfigError, match="logits are"):
        token_logprobs(logits.double(), token_ids, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("row", SETTINGS, ids=str)
def test_a_device_draws_what_the_host_draws(row: dict):
    logits = torch.randn(16, 32_000, generator=torch.Generator().manual_seed(0)) * 3
    draws = make_draws([{**row, "seed": seed} for seed in range(16)], position=5)
    on_device = Draws(
        **{
            name: value.cuda() if isinstance(value := getattr(draws, name), torch.Tensor) else value
            for name in Draws.__dataclass_fields__
        }
    )
    host, _ = sample(logits, [draws])
    device, is_valid = sample(logits.cuda(), [on_device])
    assert is_valid.all()
    assert (device.cpu() == host).sum() >= 15  # exp may differ in the last bit
