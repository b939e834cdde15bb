"""Which items a queue has, against what they must cover: every key of every row, once, within the memory there is."""

import random

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.attention.tiles import short_tiles
from flashtensors.kernels.attention.work_queue import WorkQueue

from ..tolerances import DEVICE

HEADS = 2


def queue_of(new_tokens: list[int], *, tile_tokens: int, target: int, heads: int = HEADS) -> WorkQueue:
    return WorkQueue(
        max_seqs=len(new_tokens), max_tokens=sum(new_tokens), num_heads=heads, head_dim=16, tile_tokens=tile_tokens,
        tile_rows=16, max_target=target, max_programs=8, device=DEVICE,
    )  # fmt: skip


def fill(queue: WorkQueue, lengths: list[int], new_tokens: list[int], window: int | None = None) -> list[list[int]]:
    """All records: first row, its position, rows, key begin, key end, split, number of splits, sequence, slot."""
    starts = torch.tensor([0, *torch.tensor(new_tokens).cumsum(0)], dtype=torch.int32, device=DEVICE)
    queue.fill(
        starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), min_tokens=1, max_tokens=1 << 30,
        target_items=queue.max_target, window=window,
    )  # fmt: skip
    num_items, num_slots, _ = queue.counts.tolist()
    assert num_items <= queue.max_items
    assert num_slots <= queue.max_slots
    return queue.items[:num_items].tolist()


def batches() -> list[tuple[list[int], list[int], int | None]]:
    """Lengths, new tokens and windows, among them the longest that there are."""
    draw = random.Random(0)
    cases: list[tuple[list[int], list[int], int | None]] = [
        ([131_072], [1], None),
        ([131_072] + [1] * 20, [1] * 21, None),
        ([131_072] * 12, [1] * 12, None),
        ([8192, 8192], [8192, 1], None),
        ([131_072, 40], [60, 40], 500),
        ([0, 7, 0, 64], [0, 7, 0, 1], None),
    ]
    for _ in range(12):
        lengths = [int(10 ** draw.uniform(0, 4.5)) for _ in range(draw.randint(1, 24))]
        new_tokens = [draw.choice([0, 1, 1, 1, min(length, draw.randint(1, 300))]) for length in lengths]
        cases.append((lengths, new_tokens, draw.choice([None, None, 700])))
    return cases


@pytest.mark.parametrize(("lengths", "new_tokens", "window"), batches())
@pytest.mark.parametrize(("tile_tokens", "target"), [(8, 8), (64, 132)])
def test_items_cover_every_key_of_every_row_once(
    lengths: list[int], new_tokens: list[int], window: int | None, tile_tokens: int, target: int
) -> None:
    records = fill(queue_of(new_tokens, tile_tokens=tile_tokens, target=target), lengths, new_tokens, window)
    seen_until: dict[int, int] = {}
    slots = set()
    used = sorted((record for record in records if record[2]), key=lambda record: (record[0], record[3]))
    for row, position, rows, begin, end, split, splits, sequence, slot in used:
        first = lengths[sequence] - new_tokens[sequence]
        assert position - row == first - sum(new_tokens[:sequence])
        assert end - begin > 0
        if split == 0:
            assert begin <= (0 if window is None else max(0, position - window + 1))
        else:
            assert begin == seen_until[row]
        seen_until[row] = end
        if split == splits - 1:
            assert end == position + rows
        if splits > 1:
            slots.add(slot)
    assert len(slots) == sum(record[6] > 1 for record in used), "sums share a place"
    tiles = {(record[0], record[2]) for record in used}
    assert sorted(row + i for row, rows in tiles for i in range(rows)) == list(range(sum(new_tokens)))


def test_items_of_many_keys_come_first() -> None:
    lengths = [300, 64, 2000, 5, 1999, 128, 700]
    records = fill(queue_of([1] * 7, tile_tokens=8, target=4), lengths, [1] * 7)
    keys = [end - begin for _, _, _, begin, end, *_ in records]
    assert len(keys) == len(lengths)
    assert keys == sorted(lengths, reverse=True)


def test_equal_sequences_keep_their_order() -> None:
    records = fill(queue_of([1] * 9, tile_tokens=8, target=4), [500] * 9, [1] * 9)
    assert [record[7] for record in records] == list(range(9))


@pytest.mark.parametrize(("num_seqs", "bucket"), [(33, 40), (40, 40), (65, 80)])
@pytest.mark.parametrize("length", [100, 8000])
def test_many_sequences_of_one_length_stay_whole(num_seqs: int, bucket: int, length: int) -> None:
    target = round(short_tiles(bucket, 8, 128, 132).items * 132)
    queue = queue_of([1] * num_seqs, tile_tokens=8, target=target, heads=8)
    assert len(fill(queue, [length] * num_seqs, [1] * num_seqs)) == num_seqs


def test_one_long_sequence_among_many_is_split() -> None:
    target = round(short_tiles(64, 8, 128, 132).items * 132)
    records = fill(queue_of([1] * 64, tile_tokens=8, target=target, heads=8), [64_000] + [1000] * 63, [1] * 64)
    total = 64_000 + 63 * 1000
    assert max(end - begin for _, _, _, begin, end, *_ in records) < 2 * total / 64
