"""Sampling kernels: the distribution they say they drew from against fp64, and draws against the CPU's."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from flashtensors.errors import ConfigError
from flashtensors.kernels import sampling_launch
from flashtensors.kernels.sampling import sample
from flashtensors.kernels.sampling_launch import Sampled, launch_sample
from flashtensors.kernels.sampling_rows import SamplingRows

from .launch_options import launch_options
from .sampling_oracle import SETTINGS, assert_draws_fit, make_rows, probabilities, probabilities_of_cuts
from .tolerances import DEVICE, DTYPES

HAS_CUDA = DEVICE == "cuda"


def make_logits(num_rows: int, vocab_size: int, *, dtype: torch.dtype = torch.float32, scale: float = 3.0):
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    return (torch.randn(num_rows, vocab_size, generator=generator) * scale).to(device=DEVICE, dtype=dtype)


def reference(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    on_host = SamplingRows(**{name: getattr(rows, name).cpu() for name in SamplingRows.__dataclass_fields__})
    return sample(logits.cpu().float(), on_host.to_draws(logits.shape[1]))[0]


def check_distributions(logits: torch.Tensor, settings: list[dict]) -> Sampled:
    """Sample every row, and hold what it was drawn from to the definition."""
    sampled = launch_sample(logits, make_rows(settings), has_cuts=True)
    assert sampled.is_valid_S.all()
    for row, setting in enumerate(settings):
        expected = probabilities(logits[row], setting)
        actual = probabilities_of_cuts(logits[row], sampled.cuts, row, setting)
        assert ((actual > 0) == (expected > 0)).all(), setting
        np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=1e-12, err_msg=str(setting))
        assert expected[sampled.token_ids_S[row].item()] > 0, setting
    return sampled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 40, 777, pytest.param(151_936, marks=pytest.mark.gpu)])
def test_rows_are_drawn_from_their_distribution(vocab_size: int, dtype: torch.dtype) -> None:
    logits = make_logits(len(SETTINGS), vocab_size, dtype=dtype)
    check_distributions(logits, [{**setting, "seed": row} for row, setting in enumerate(SETTINGS)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    num_seeds = 50 if HAS_CUDA else 2
    settings = [{**setting, "seed": seed} for setting in SETTINGS for seed in range(num_seeds)]
    logits = make_logits(len(settings), 32_000 if HAS_CUDA else 1000, dtype=dtype)
    rows = make_rows(settings)
    token_ids = launch_sample(logits, rows).token_ids_S.cpu()
    num_different = (token_ids != reference(logits, rows)).sum().item()
    assert num_different <= num_seeds * len(SETTINGS) // 200  # sums in another order


@pytest.mark.parametrize("value", [0.0, -0.0, 1e30, -2.45e5])
def test_equal_logits_are_taken_by_id(value: float) -> None:
    logits = torch.full((4, 300), value, device=DEVICE)
    logits[:, ::2] *= -1 if value == 0 else 1  # 0.0 and -0.0 are equal
    check_distributions(logits, [{"temperature": 0.0}, {"top_k": 7}, {"top_p": 0.5}, {"top_k": 200, "top_p": 0.5}])


@pytest.mark.parametrize("value", [3e38, 2.45e5, 1e-40])
def test_extreme_logits_and_temperatures(value: float) -> None:
    logits = make_logits(4, 200)
    logits[:, 50] = value
    logits[:, 60] = -value
    settings = [{}, {"top_k": 9, "top_p": 0.9}, {"temperature": 1e-38}, {"temperature": 100.0, "top_p": 0.99}]
    token_ids = launch_sample(logits, make_rows(settings)).token_ids_S.cpu()
    assert torch.equal(token_ids, reference(logits, make_rows(settings)))


def test_more_tokens_than_are_listed() -> None:
    logits = make_logits(5, 6000, scale=0.1)
    logits[3:, 100:5900] = 0.25
    settings = [{"top_p": 0.97}, {"top_k": 5000}, {"min_p": 0.01}, {"top_k": 5500, "top_p": 0.9}, {"top_p": 0.8}]
    sampled = check_distributions(logits, [{**setting, "seed": 1} for setting in settings])
    assert torch.equal(
        sampled.token_ids_S.cpu(), reference(logits, make_rows([{**setting, "seed": 1} for setting in settings]))
    )


def test_frequencies_are_the_exact_probabilities() -> None:
    num_draws = 20_000 if HAS_CUDA else 40
    logits = make_logits(1, 12, scale=1.0)
    for setting in SETTINGS if HAS_CUDA else ({}, {"top_k": 6, "top_p": 0.9}):
        rows = make_rows([{**setting, "seed": seed} for seed in range(num_draws)])
        token_ids = launch_sample(logits.expand(num_draws, -1).contiguous(), rows).token_ids_S
        assert_draws_fit(token_ids.cpu().numpy(), probabilities(logits[0], setting))


def test_a_draw_depends_on_its_row_alone() -> None:
    logits = make_logits(len(SETTINGS), 500)
    settings = [{**setting, "seed": 7} for setting in SETTINGS]
    together = launch_sample(logits, make_rows(settings)).token_ids_S
    for row, setting in enumerate(settings):
        assert launch_sample(logits[row : row + 1], make_rows([setting])).token_ids_S[0] == together[row]


def test_rows_apart_in_memory_with_garbage_between() -> None:
    wide = torch.full((3, 300), torch.nan, device=DEVICE)
    wide[:, :200] = make_logits(3, 200)
    check_distributions(wide[:, :200], [{}, {"top_k": 5}, {"temperature": 0.0}])


def test_rows_that_are_not_numbers_are_reported_and_harm_no_other() -> None:
    clean = make_logits(9, 300)
    settings = [setting for setting in ({}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}) for _ in range(3)]
    logits = clean.clone()
    logits[0, 7], logits[4, 290], logits[8, 130] = torch.nan, torch.inf, torch.nan
    logits[3] = logits[6] = -torch.inf
    bad = [0, 3, 4, 6, 8]
    stops = torch.zeros(9, 1, dtype=torch.int32, device=DEVICE)
    sampled = launch_sample(logits, make_rows(settings), stop_ids_SN=stops)
    assert (~sampled.is_valid_S).nonzero().flatten().tolist() == bad
    assert not sampled.token_ids_S[bad].any()
    assert not sampled.is_finished_S[bad].any()
    good = [row for row in range(9) if row not in bad]
    assert torch.equal(sampled.token_ids_S[good], launch_sample(clean, make_rows(settings)).token_ids_S[good])


def test_masked_tokens_are_never_drawn() -> None:
    settings = [{}, {"top_k": 30}, {"top_p": 0.999}, {"min_p": 0.1}, {"temperature": 0.0}]
    logits = torch.full((len(settings), 300), -torch.inf, device=DEVICE)
    logits[:, 128:140] = make_logits(len(settings), 12)
    check_distributions(logits, settings)


def test_stop_ids_end_rows() -> None:
    logits = make_logits(3, 50)
    best = logits.argmax(1).int()
    stops = torch.full((3, 3), -1, dtype=torch.int32, device=DEVICE)
    stops[0, 2], stops[1, 0] = best[0], (best[1] + 1) % 50
    sampled = launch_sample(logits, SamplingRows.greedy(3, DEVICE), stop_ids_SN=stops)
    assert sampled.is_finished_S.tolist() == [True, False, False]


def test_batches_of_any_number_of_stop_ids_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def options_of(num_stop_ids: int) -> dict[str, int]:
        stops = torch.zeros(3, num_stop_ids, dtype=torch.int32, device=DEVICE)
        draw = functools.partial(launch_sample, make_logits(3, 50), SamplingRows.greedy(3, DEVICE), stop_ids_SN=stops)
        return launch_options(monkeypatch, sampling_launch, "choose", draw)

    assert options_of(5) == options_of(6) == options_of(8)
    assert options_of(5) != options_of(0)


def test_rows_without_nuclei_need_no_histogram() -> None:
    settings = [setting for setting in SETTINGS if "top_k" in setting or "top_p" not in setting]
    logits, rows = make_logits(len(settings), 300), make_rows(settings)
    assert torch.equal(
        launch_sample(logits, rows, has_nuclei=False).token_ids_S, launch_sample(logits, rows).token_ids_S
    )


def test_no_rows() -> None:
    sampled = launch_sample(torch.empty(0, 7, device=DEVICE), SamplingRows.greedy(0, DEVICE), has_cuts=True)
    assert sampled.token_ids_S.shape == sampled.is_valid_S.shape == (0,)


def test_draws_in_groups_are_the_same_rows() -> None:
    settings = [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_k": 3}, {"seed": 3, "min_p": 0.1}]
    rows = make_rows(settings)
    again = SamplingRows.from_draws(rows.to_draws(100), len(settings), rows.seed_S.device)
    for name in SamplingRows.__dataclass_fields__:
        assert torch.equal(getattr(again, name)[1:], getattr(rows, name)[1:])
    assert again.temperature_S[0] == 0
    assert SamplingRows.from_draws(make_rows([{}]).to_draws(9), 1, rows.seed_S.device).temperature_S.tolist() == [1.0]


def test_what_does_not_fit_is_refused() -> None:
    logits, rows = make_logits(2, 30), SamplingRows.greedy(2, DEVICE)
    with pytest.raises(ConfigError, match="logits are"):
        launch_sample(logits.double(), rows)
    with pytest.raises(ConfigError, match="last must be 1"):
        launch_sample(logits.repeat(15, 1).T, rows)
    with pytest.raises(ConfigError, match="temperature_S is"):
        launch_sample(logits, SamplingRows.greedy(3, DEVICE))
    with pytest.raises(ConfigError, match="stop_ids_SN is"):
        launch_sample(logits, rows, stop_ids_SN=torch.zeros(2, 1, device=DEVICE))


@pytest.mark.gpu
def test_a_graph_draws_with_new_parameters() -> None:
    logits, rows = make_logits(len(SETTINGS), 32_000), make_rows(SETTINGS)
    launch_sample(logits, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch_sample(logits, rows)
    fresh = make_rows([{**setting, "seed": 5} for setting in reversed(SETTINGS)])
    for name in SamplingRows.__dataclass_fields__:
        getattr(rows, name).copy_(getattr(fresh, name))
    graph.replay()
    assert torch.equal(captured.token_ids_S, launch_sample(logits, fresh).token_ids_S)
