"""Tiles of the split kernel, chosen from what the host knows when it launches or captures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitTiles:
    """How a launch of the split kernel cuts its work."""

    block_m: int
    """Rows of a tile, heads of a group included."""
    block_n: int
    """Keys of a step of its loop."""
    num_warps: int
    num_stages: int
    """Loads of keys and values under way."""
    programs: int
    """Programs for each multiprocessor."""
    items: float = 1.0
    """Items, over all heads, that splitting aims at for each multiprocessor."""
    merged_rows: int = 32
    """Rows of splits that a merge adds up at a time."""


def short_tiles(head_dim: int) -> SplitTiles:
    """Tiles of decodes and short appends.

    One program for each multiprocessor has too few bytes in flight (64 sequences of 8k tokens: 523 µs), three or four
    disturb each other's pages (530, 579 µs), two take 476 µs on an H200. Where there are fewer tiles than
    multiprocessors, splitting aims at one item each: what more items gain, merging them costs.
    """
    if head_dim > 128:
        return SplitTiles(block_m=16, block_n=32, num_warps=4, num_stages=3, programs=2)
    return SplitTiles(block_m=16, block_n=64, num_warps=4, num_stages=5, programs=2)


def long_tiles(head_dim: int) -> SplitTiles:
    """Tiles of prefills and of groups where the Hopper kernel does not run."""
    block_n, num_stages = (32, 3) if head_dim > 128 else (64, 2)
    return SplitTiles(block_m=64, block_n=block_n, num_warps=4, num_stages=num_stages, programs=2, items=2.0)
