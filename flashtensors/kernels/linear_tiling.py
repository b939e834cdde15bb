"""Which products the Hopper kernel of `linear.py` takes from cuBLAS, and how it cuts them: measured on an H200.

A product is cut into tiles of 64 outputs and all rows. Where there are few tiles, their inputs are cut too, so that at
least 64 programs have weights on their way. Up to two tiles for each multiprocessor, each tile has a program; where
there are more and they do not come out even, programs get equal parts of the line of all chunks.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64
"""Above it cuBLAS is quicker: rows are read once for each tile, and sums of tiles that are shared grow with them."""

LEAST_ELEMENTS = 1 << 19
"""Of a weight; smaller ones are bound by the launch alone."""

_RING_BYTES = 208 << 10
"""Of chunks in shared memory."""

_FEWEST_PROGRAMS = 64
"""That keep enough bytes on their way to reach the rate of a copy."""

_LONG_PART = 22
"""Chunks of a program from which on more programs than enough gain more than adding up their sums costs."""

_BLOCK_OUTPUTS = 64
_BLOCK_INPUTS = 128

MOST_TILE_ELEMENTS = _BLOCK_OUTPUTS * MOST_ROWS
"""Of the tiles that programs share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a product is cut."""

    block_rows: int
    """At least T, a power of two from 8 on."""
    block_outputs: int
    """Rows of the weight in a tile."""
    block_inputs: int
    """Columns of the weight in a chunk."""
    stages: int
    """Chunks in the ring of a program."""
    num_programs: int
    is_split: bool
    """Whether programs may share a tile."""


def choose_tiling(num_rows: int, num_inputs: int, num_outputs: int, num_multiprocessors: int) -> Tiling:
    """The cut of a product with 1 to `MOST_ROWS` rows.

    Which chunks are added up together does not depend on the number of rows, so that neither does the sum of a row.
    """
    block_rows = max(8, 1 << (num_rows - 1).bit_length())
    tiles, chunks = -(-num_outputs // _BLOCK_OUTPUTS), -(-num_inputs // _BLOCK_INPUTS)
    num_programs, ring_bytes = min(tiles, num_multiprocessors), _RING_BYTES
    if tiles < _FEWEST_PROGRAMS or (2 * tiles <= num_multiprocessors and chunks > _LONG_PART):
        num_programs = _num_programs(tiles, chunks, num_multiprocessors)
    elif num_multiprocessors < tiles <= 2 * num_multiprocessors:  # two rings fit beside each other
        num_programs, ring_bytes = tiles, _RING_BYTES // 2
    longest_part = -(-tiles * chunks // num_programs)
    return Tiling(
        block_rows=block_rows,
        block_outputs=_BLOCK_OUTPUTS,
        block_inputs=_BLOCK_INPUTS,
        stages=max(2, min(ring_bytes // ((_BLOCK_OUTPUTS + block_rows) * _BLOCK_INPUTS * 2), longest_part)),
        num_programs=num_programs,
        is_split=not _is_even(tiles, num_programs),
    )


def _num_programs(tiles: int, chunks: int, num_multiprocessors: int) -> int:
    """Where tiles are few: an even number for each, more than enough only where chunks are many."""
    parts = [n for n in range(1, chunks + 1) if chunks % n == 0 and tiles * n <= num_multiprocessors]
    enough = [n for n in parts if tiles * n >= _FEWEST_PROGRAMS]
    if not enough:
        return min(tiles * chunks, num_multiprocessors)
    return tiles * next((n for n in enough if chunks // n <= _LONG_PART), enough[-1])


def _is_even(tiles: int, num_programs: int) -> bool:
    """Whether programs that take whole tiles are busy for at least nine tenths of the time."""
    return tiles >= 0.9 * -(-tiles // num_programs) * num_programs
