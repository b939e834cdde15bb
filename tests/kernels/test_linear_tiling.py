"""The cut of products of few rows: every chunk once, parts that come out even, and a ring that fits."""

from __future__ import annotations

import itertools

import pytest

from flashtensors.kernels.linear_tiling import MOST_ROWS, MOST_TILE_ELEMENTS, choose_tiling

SHARED_BYTES_OF_A_BLOCK = 232_448
OUTPUTS = [7, 512, 1024, 2880, 4096, 6144, 10240, 24576, 151936]
INPUTS = [8, 256, 1024, 2944, 4096, 12288]


@pytest.mark.parametrize("num_multiprocessors", [114, 132])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, MOST_ROWS])
def test_parts_are_fair_and_fit(num_rows: int, num_multiprocessors: int) -> None:
    for num_outputs, num_inputs in itertools.product(OUTPUTS, INPUTS):
        tiling = choose_tiling(num_rows, num_inputs, num_outputs, num_multiprocessors)
        tiles = -(-num_outputs // tiling.block_outputs)
        chunks = tiles * -(-num_inputs // tiling.block_inputs)
        assert num_rows <= tiling.block_rows <= max(8, 2 * num_rows - 1)
        rounds = 2 if tiling.num_programs == tiles else 1
        assert 1 <= tiling.num_programs <= min(chunks, rounds * num_multiprocessors)
        most = -(-chunks // tiling.num_programs)
        if not tiling.is_split:
            most = -(-tiles // tiling.num_programs) * (chunks // tiles)
        assert most <= max(chunks / tiling.num_programs / 0.9, chunks / tiling.num_programs + 1)
        assert tiling.block_outputs * tiling.block_rows <= MOST_TILE_ELEMENTS
        ring_bytes = tiling.stages * (tiling.block_outputs + tiling.block_rows) * tiling.block_inputs * 2
        assert tiling.stages >= 2
        rings = 1 if tiling.num_programs <= num_multiprocessors else 2
        assert rings * (ring_bytes + 16 * tiling.stages + 4096) <= SHARED_BYTES_OF_A_BLOCK


def test_what_is_added_up_together_does_not_depend_on_the_number_of_rows() -> None:
    for num_outputs, num_inputs in itertools.product(OUTPUTS, INPUTS):
        tilings = [choose_tiling(num_rows, num_inputs, num_outputs, 132) for num_rows in range(1, MOST_ROWS + 1)]
        assert len({(tiling.block_inputs, tiling.num_programs, tiling.is_split) for tiling in tilings}) == 1


def test_few_tiles_are_shared_and_many_are_not() -> None:
    few, many = choose_tiling(8, 3072, 1024, 132), choose_tiling(8, 1024, 6144, 132)
    assert few.is_split
    assert few.num_programs % 16 == 0
    assert not many.is_split
    assert many.num_programs == 96
