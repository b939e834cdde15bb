"""How a step's decode is shared out, against what the shares must cover: every key of every row, once."""

import random

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.attention.stream_queue import GRAIN, StreamQueue

from ..tolerances import DEVICE

HEADS = 3
SHORT = 16


def queue_of(new_tokens: list[int], num_programs: int, tile_tokens: int = 4) -> StreamQueue:
    return StreamQueue(
        max_seqs=len(new_tokens), max_rows=max(1, sum(new_tokens)), num_heads=HEADS, head_dim=16,
        tile_tokens=tile_tokens, tile_rows=16, num_programs=num_programs, device=DEVICE,
    )  # fmt: skip


def fill(queue: StreamQueue, lengths: list[int], new_tokens: list[int], window: int | None = None) -> None:
    starts = torch.tensor([0, *torch.tensor(new_tokens).cumsum(0)], dtype=torch.int32, device=DEVICE)
    queue.fill(
        starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), max_tokens=SHORT, window=window
    )  # fmt: skip


def pieces_of(queue: StreamQueue) -> list[tuple[int, int, int, int, int]]:
    """(program, tile, head, first grain, last grain) of all pieces, in order."""
    starts, tiles, pieces = queue.starts.tolist(), queue.tiles.tolist(), []
    for program in range(queue.num_programs):
        (index, grain), end = starts[program], tuple(starts[program + 1])
        while (index, grain) < end:
            tile, head = divmod(index, HEADS)
            last = end[1] if index == end[0] else tiles[tile][8]
            pieces.append((program, tile, head, grain, last))
            index, grain = index + 1, 0
    return pieces


def batches() -> list[tuple[list[int], list[int], int | None]]:
    """Lengths, new tokens and windows."""
    draw = random.Random(0)
    cases: list[tuple[list[int], list[int], int | None]] = [
        ([131_072], [1], None),
        ([100, 131_072, 1], [1, 1, 1], None),
        ([0, 7, 0, 64], [1, 7, 0, 1], None),
        ([900, 4000, 70], [1, 100, 16], None),
        ([5000, 90], [16, 3], 500),
        ([40, 40], [40, 0], None),
    ]
    for _ in range(8):
        lengths = [int(10 ** draw.uniform(0, 4)) for _ in range(draw.randint(1, 24))]
        new_tokens = [draw.choice([0, 1, 1, min(length, draw.randint(1, 40))]) for length in lengths]
        cases.append((lengths, new_tokens, draw.choice([None, None, 700])))
    return cases


@pytest.mark.parametrize(("lengths", "new_tokens", "window"), batches())
@pytest.mark.parametrize("num_programs", [1, 7, 64])
def test_shares_cover_every_key_of_every_row_once(
    lengths: list[int], new_tokens: list[int], window: int | None, num_programs: int
) -> None:
    queue = queue_of(new_tokens, num_programs)
    fill(queue, lengths, new_tokens, window)
    tiles = queue.tiles.tolist()
    covered: dict[tuple[int, int], int] = {}
    for _, tile, head, grain, last in pieces_of(queue):
        assert grain == covered.get((tile, head), 0)
        covered[tile, head] = last
    used = sorted({tile for tile, _ in covered})
    assert used == list(range(len(used)))
    assert all(covered[tile, head] == tiles[tile][8] for tile in used for head in range(HEADS))
    rows = []
    for row, position, num_rows, sequence, span_begin, begin, end, _, grains, _ in (tiles[tile] for tile in used):
        assert position == lengths[sequence] - new_tokens[sequence] + row - sum(new_tokens[:sequence])
        assert span_begin == lengths[sequence] - new_tokens[sequence]
        assert begin % GRAIN == 0
        assert begin <= (0 if window is None else max(0, position - window + 1))
        assert end == position + num_rows
        assert begin + grains * GRAIN >= end
        rows += range(row, row + num_rows)
    firsts = [sum(new_tokens[:s]) for s in range(len(lengths))]
    assert rows == [
        row for s, first in enumerate(firsts) if new_tokens[s] <= SHORT for row in range(first, first + new_tokens[s])
    ]


@pytest.mark.parametrize(("lengths", "new_tokens", "window"), batches())
def test_programs_and_slots_of_pieces_follow_from_the_tile(
    lengths: list[int], new_tokens: list[int], window: int | None
) -> None:
    queue = queue_of(new_tokens, 13)
    fill(queue, lengths, new_tokens, window)
    tiles, share = queue.tiles.tolist(), int(queue.share)
    slots = set()
    by_tile: dict[tuple[int, int], list[int]] = {}
    for program, tile, head, grain, last in pieces_of(queue):
        by_tile.setdefault((tile, head), []).append(program)
        if last - grain < tiles[tile][8]:
            slot = (program, grain == 0)
            assert slot not in slots
            slots.add(slot)
    for (tile, head), programs in by_tile.items():
        first_unit = tiles[tile][7] + head * tiles[tile][9]
        first, last = first_unit // share, (first_unit + tiles[tile][8] - 1) // share
        assert programs == list(range(first, last + 1))


def units_of(queue: StreamQueue) -> list[int]:
    """What each program has been given: its grains, and the ends of the tiles that it begins."""
    end_units = [row[9] - row[8] for row in queue.tiles.tolist()]
    units = [0] * queue.num_programs
    for program, tile, _, grain, last in pieces_of(queue):
        units[program] += last - grain + (end_units[tile] if grain == 0 else 0)
    return units


def test_shares_are_equal() -> None:
    lengths = [random.Random(0).randint(100, 2000) for _ in range(16)]
    queue = queue_of([1] * 16, 20)
    fill(queue, lengths, [1] * 16)
    units, end_units = units_of(queue), queue.end_grains
    assert max(units) - min(units[:-1]) <= 2 * end_units, "a share may end between a tile's end and its first grain"
    assert max(units) * 20 - sum(units) < 20 * (1 + end_units)


def test_who_has_many_short_tiles_has_fewer_keys() -> None:
    queue = queue_of([1] * 20, 8)
    fill(queue, [4096] * 2 + [GRAIN] * 18, [1] * 20)
    keys = [0] * 8
    for program, _, _, grain, last in pieces_of(queue):
        keys[program] += last - grain
    assert keys[-1] < keys[0] / 2


@pytest.mark.parametrize("lengths", [[1024] * 16, [100, 900]])
def test_ends_of_equal_or_few_tiles_take_no_part(lengths: list[int]) -> None:
    queue = queue_of([1] * len(lengths), 24)
    fill(queue, lengths, [1] * len(lengths))
    assert all(row[9] == row[8] for row in queue.tiles.tolist())
    units = units_of(queue)
    assert max(units) == -(-sum(units) // 24)


def test_nothing_is_shared_where_there_are_no_sequences() -> None:
    queue = queue_of([5], 4)
    fill(queue, [50], [5])
    assert pieces_of(queue)
    fill(queue, [], [])
    assert not pieces_of(queue)
