"""Rates are measured or unknown; what loads cost is known all the same."""

import pytest

from flashtensors.residency.machine import Residency
from flashtensors.residency.rates import DISK_BYTES_PER_S, LEAST_OBSERVED_BYTES, LINK_BYTES_PER_S, Rates

GB = 10**9


def test_nothing_is_known_before_a_load_was_observed() -> None:
    rates = Residency(10**12, keep_alive_s=-1.0).rates
    assert (rates.link_bytes_per_s, rates.disk_bytes_per_s) == (None, None)
    assert rates.seconds_to_load(10 * GB, 10 * GB) == 10 * GB / LINK_BYTES_PER_S
    assert rates.seconds_to_load(10 * GB, 4 * GB) == 6 * GB / DISK_BYTES_PER_S


def test_the_first_load_is_the_rate_and_later_ones_move_it() -> None:
    rates = Rates()
    rates.observe(disk_bytes=0, num_bytes=10 * GB, seconds=0.2)
    assert (rates.link_bytes_per_s, rates.disk_bytes_per_s) == (50 * GB, None)
    rates.observe(disk_bytes=0, num_bytes=10 * GB, seconds=0.25)
    assert rates.link_bytes_per_s == pytest.approx(47 * GB)
    rates.observe(disk_bytes=6 * GB, num_bytes=6 * GB, seconds=2.0)
    assert rates.disk_bytes_per_s == 3 * GB
    assert rates.seconds_to_load(47 * GB, 47 * GB) == pytest.approx(1.0)
    assert rates.seconds_to_load(47 * GB, 44 * GB) == pytest.approx(1.0)
    assert rates.seconds_to_load(47 * GB, 0) == pytest.approx(47 / 3)


@pytest.mark.parametrize(
    ("disk_bytes", "num_bytes", "seconds"),
    [
        (0, LEAST_OBSERVED_BYTES - 1, 0.01),
        (LEAST_OBSERVED_BYTES - 1, 10 * GB, 1.0),
        (0, 10 * GB, 0.0),
        (LEAST_OBSERVED_BYTES, 10 * GB, 1.0),  # the link was what it waited for
    ],
)
def test_a_load_that_says_nothing_of_a_rate_measures_none(disk_bytes: int, num_bytes: int, seconds: float) -> None:
    rates = Rates()
    rates.observe(disk_bytes=disk_bytes, num_bytes=num_bytes, seconds=seconds)
    assert (rates.link_bytes_per_s, rates.disk_bytes_per_s) == (None, None)
