"""Tiles of the split kernel fit what a device gives a program."""

from __future__ import annotations

import pytest
import torch

from flashtensors.kernels.attention.tiles import fit_tiles, fixed_tiles, long_tiles, short_tiles
from flashtensors.kernels.fp8 import FP8_DTYPE

ADA, HOPPER = 99 << 10, 227 << 10
BATCHES = (1, 16, 64, 256)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8_DTYPE])
@pytest.mark.parametrize("shared_bytes", [ADA, HOPPER])
def test_tiles_of_two_bytes_stay_as_they_were_measured(head_dim: int, kv_dtype: torch.dtype, shared_bytes: int) -> None:
    has_pairs = kv_dtype == FP8_DTYPE
    short = [short_tiles(num_seqs, 8, head_dim, 132, has_pairs=has_pairs) for num_seqs in BATCHES]
    for tiles in (*short, fixed_tiles(head_dim, has_pairs=has_pairs), long_tiles(head_dim)):
        assert fit_tiles(tiles, head_dim, torch.bfloat16, kv_dtype, shared_bytes) == tiles


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_of_four_bytes_stay_as_they_are_on_hopper(head_dim: int) -> None:
    short = [short_tiles(num_seqs, 8, head_dim, 132) for num_seqs in BATCHES]
    for tiles in (*short, fixed_tiles(head_dim), long_tiles(head_dim)):
        assert fit_tiles(tiles, head_dim, torch.float32, torch.float32, HOPPER) == tiles


def test_tiles_of_four_bytes_have_fewer_loads_under_way_and_then_fewer_keys() -> None:
    def fitted(tiles, head_dim: int) -> tuple[int, int]:
        tiles = fit_tiles(tiles, head_dim, torch.float32, torch.float32, ADA)
        return tiles.block_n, tiles.num_stages

    assert fitted(short_tiles(1, 8, 128, 128), 128) == (64, 3)
    assert fitted(short_tiles(16, 8, 128, 128), 128) == (32, 5)
    assert fitted(long_tiles(128), 128) == (64, 1)
    assert fitted(long_tiles(256), 256) == (16, 1)


def test_what_never_fits_ends_with_the_least_tiles() -> None:
    tiles = fit_tiles(long_tiles(256), 256, torch.float32, torch.float32, 1 << 10)
    assert (tiles.block_n, tiles.num_stages) == (16, 1)
