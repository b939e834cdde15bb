from __future__ import annotations

import random
import statistics

import numpy as np

from flashtensors.engine.lengths import MARGIN_DEVIATIONS, MIN_OBSERVATIONS, WINDOW, LengthStatistics


def expect(lengths: LengthStatistics, num_generated: int, limit: int) -> int:
    return int(lengths.expect(np.array([num_generated]), np.array([limit]))[0])


def test_with_few_observations_every_answer_may_reach_its_limit() -> None:
    lengths = LengthStatistics()
    for _ in range(MIN_OBSERVATIONS - 1):
        lengths.add(3)
    assert expect(lengths, 0, 900) == 900
    lengths.add(3)
    assert expect(lengths, 0, 900) == 3


def test_an_answer_is_expected_to_be_as_long_as_those_that_outlived_it() -> None:
    rng = random.Random(0)
    lengths, seen = LengthStatistics(), [rng.randint(1, 300) for _ in range(WINDOW + 500)]
    for length in seen:
        lengths.add(length)
    for num_generated in (0, 10, 150, 298):
        longer = [length for length in seen[-WINDOW:] if length > num_generated]
        mean = statistics.fmean(longer) + MARGIN_DEVIATIONS * statistics.pstdev(longer)
        assert abs(expect(lengths, num_generated, 10_000) - mean) <= 1
        assert expect(lengths, num_generated, 299) <= 299


def test_an_answer_that_outgrew_all_others_may_reach_its_limit() -> None:
    lengths = LengthStatistics()
    for _ in range(MIN_OBSERVATIONS):
        lengths.add(20)
    assert (expect(lengths, 19, 900), expect(lengths, 20, 900)) == (20, 900)
