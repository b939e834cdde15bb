"""Tiles of the split kernel, chosen from what the host knows when it launches or captures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

MOST_PROGRAMS = 4
"""Programs of any choice for each multiprocessor."""

_LEAST_KEYS = 16
"""Of a step: matrix units multiply no fewer."""


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


def short_tiles(
    num_seqs: int, num_kv_heads: int, head_dim: int, num_processors: int, *, has_pairs: bool = False
) -> SplitTiles:
    """Tiles of decodes and short appends: bytes in flight decide, and where there are few tiles, what merging costs.

    On an H200 (132 multiprocessors, 8 key heads of dim 128), µs of the choices below, and of 4 warps and two programs
    for each multiprocessor in place of the last:

        batch x context       1 x 8k  1 x 32k  8 x 1k  8 x 8k  64 x 1k  64 x 8k
        one long item each      16.3     41.8    15.8    74.0
        two short items each    18.5     42.6    15.1    69.6
        one item a program                                          68      491
        4 warps, two programs   19.1     51.7    18.9    94.5       78      493

    The last fills a multiprocessor's registers with four programs. Of dim 64 a program has half the bytes in flight:
    256 sequences of 100 to 1,600 tokens take 122 µs with 4 warps and four programs, 146 with two; 1,024 of them 435
    and 525. With so many tiles only a sequence that is longer than others is split: at most one item for each tile is
    aimed at, so sequences of one length stay whole.

    Pairs of fp8 are half the bytes, so more of them are under way. Decodes of 100 to 2,000 tokens, µs by keys of a
    step x warps x stages:

        dim 128, 256 sequences    64 x 2 x 4  178    64 x 2 x 8  153    64 x 4 x 5  155    128 x 4 x 8  183
        dim 64, 256 sequences     64 x 4 x 5   93    64 x 2 x 8  113    64 x 4 x 8   96    128 x 4 x 5  123
        dim 128, 16 sequences     32 x 2 x 8 22.7    64 x 2 x 8 20.6    64 x 4 x 8 20.5    128 x 4 x 8 19.4
        dim 64, 16 sequences      32 x 2 x 8 17.3    64 x 2 x 8 15.3    64 x 4 x 8 12.9    128 x 4 x 8 14.1

    The last of these takes more shared memory than Ada gives a program.

    Args:
        num_seqs: Of a batch.
        num_kv_heads: Key-value heads.
        head_dim: Elements in a row.
        num_processors: Multiprocessors of the device.
        has_pairs: Whether caches are read as pairs of fp8 (`fp8_pairs.py`).
    """
    if head_dim > 128:
        return fixed_tiles(head_dim)
    num_tiles = num_seqs * num_kv_heads
    if num_tiles * 4 <= num_processors:
        return SplitTiles(block_m=16, block_n=64, num_warps=4, num_stages=5, programs=1)
    if num_tiles < 2 * num_processors:
        block_n, num_warps = (64, 4) if has_pairs else (32, 2)
        return SplitTiles(
            block_m=16, block_n=block_n, num_warps=num_warps, num_stages=8, programs=2, items=2.0, merged_rows=16
        )  # fmt: skip
    items = min(num_tiles / num_processors, MOST_PROGRAMS)
    return dataclasses.replace(fixed_tiles(head_dim, has_pairs=has_pairs), items=items)


def fixed_tiles(head_dim: int, *, has_pairs: bool = False) -> SplitTiles:
    """Tiles of decodes and short appends of any number: those of `short_tiles` for many sequences.

    Keys of a step, warps and merged rows set the order of sums, so `is_deterministic` takes them for every batch.
    """
    if head_dim > 128:
        return SplitTiles(block_m=16, block_n=32, num_warps=4, num_stages=3, programs=2)
    num_warps, num_stages = (4, 5) if head_dim <= 64 else (2, 8 if has_pairs else 4)
    return SplitTiles(block_m=16, block_n=64, num_warps=num_warps, num_stages=num_stages, programs=MOST_PROGRAMS)


def long_tiles(head_dim: int) -> SplitTiles:
    """Tiles of prefills and of groups where the Hopper kernel does not run."""
    block_n, num_stages = (32, 3) if head_dim > 128 else (64, 2)
    return SplitTiles(block_m=64, block_n=block_n, num_warps=4, num_stages=num_stages, programs=2, items=2.0)


def fit_tiles(
    tiles: SplitTiles, head_dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, shared_bytes: int
) -> SplitTiles:
    """`tiles` with fewer loads under way, then of fewer keys, as far as `shared_bytes` of a program make it needed."""
    while _bytes_of(tiles, head_dim, dtype.itemsize, kv_dtype.itemsize) > shared_bytes:
        if tiles.num_stages > 1:
            tiles = dataclasses.replace(tiles, num_stages=tiles.num_stages - 1)
        elif tiles.block_n > _LEAST_KEYS:
            tiles = dataclasses.replace(tiles, block_n=tiles.block_n // 2)
        else:
            break
    return tiles


def _bytes_of(tiles: SplitTiles, head_dim: int, itemsize: int, kv_itemsize: int) -> int:
    """At least the shared memory that Triton takes for `tiles`, as seen of 1 to 8 stages on Ada.

    Half the stages lie between reads of page numbers and those of keys and values, the others before products.
    """
    num_columns = 1 << (head_dim - 1).bit_length()
    num_elements, num_buffers = tiles.block_n * num_columns, tiles.num_stages // 2
    size = tiles.block_m * ((num_columns + tiles.block_n) * itemsize + 4)
    size += num_buffers * (2 * num_elements * kv_itemsize + 4 * tiles.block_n)
    if not num_buffers or kv_itemsize != itemsize:  # keys and values pass through on their way to a product
        size += num_elements * itemsize
    return size


@dataclass(frozen=True)
class StreamTiles:
    """How the streaming kernel of Hopper uses a multiprocessor: its programs share 227 KB and 64 Ki registers."""

    programs: int
    """Programs for each multiprocessor."""
    block_n: int
    """Keys of a step of its loop."""
    slots: int
    """Tiles of keys or values that a program has under way."""
    registers: int
    """Of a thread as it starts; then the warp of loads gives its own away."""


def stream_tiles(head_dim: int) -> StreamTiles:
    """Two programs, so that one computes while the other waits; steps of as many bytes for each head dim."""
    return StreamTiles(programs=2, block_n=8192 // max(64, head_dim), slots=6, registers=128)


def does_stream_pay(num_seqs: int, num_kv_heads: int, head_dim: int, num_processors: int) -> bool:
    """Whether decodes are quicker in the streaming kernel than in the split one.

    It reads keys before the kernel in front has ended and has more bytes under way; ends of tiles cost it more. On an
    H200 (8 key heads, sequences of 100 to 1,600 tokens), µs of a whole decode step, while it still computed 64 rows for
    16; since then the kernel alone takes up to 9 % less:

        sequences               8     16     32     64    128    256
        Llama-3.2-1B, dim 64
          split             1,082         1,645  1,657  2,215  3,441
          stream              985         1,297  1,639  2,367  3,577
        Qwen3-0.6B, dim 128
          split                    1,552         2,957  4,557
          stream                   1,352         2,754  4,699

    With dim 256 (4 key heads), µs of the kernel alone:

        batch x context     1 x 32k  8 x 1k  64 x 1k  64 x 8k  256 x 1k
          split                  72    22.8       79      555       295
          stream                 47    14.3       77      489       261
    """
    return head_dim > 128 or num_seqs * num_kv_heads <= MOST_PROGRAMS * num_processors
