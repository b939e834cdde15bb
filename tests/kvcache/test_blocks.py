from __future__ import annotations

import pytest

from flashtensors.kvcache.blocks import BlockPool


def test_blocks_come_out_in_order_and_count_down() -> None:
    pool = BlockPool(3)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    assert (pool.num_blocks, pool.num_free) == (3, 0)


def test_worthless_blocks_go_out_before_worthy_ones_and_worthy_ones_by_age() -> None:
    pool = BlockPool(4)
    for _ in range(4):
        pool.take()
    pool.drop(2, is_worth_keeping=True)
    pool.drop(0, is_worth_keeping=True)
    pool.drop(3, is_worth_keeping=False)
    pool.drop(1, is_worth_keeping=True)
    assert [pool.take() for _ in range(4)] == [3, 2, 0, 1]


def test_an_expired_block_goes_out_next() -> None:
    pool = BlockPool(2)
    for block_id in (pool.take(), pool.take()):
        pool.drop(block_id, is_worth_keeping=True)
    pool.expire(1)
    assert pool.take() == 1
    pool.expire(1)  # held: nothing happens
    assert pool.take() == 0


def test_a_block_is_free_when_every_holder_has_dropped_it() -> None:
    pool = BlockPool(1)
    pool.take()
    pool.hold(0)
    pool.drop(0, is_worth_keeping=True)
    assert pool.num_free == 0
    pool.check_invariants([[0]])
    pool.drop(0, is_worth_keeping=True)
    assert pool.num_free == 1
    pool.hold(0)
    assert (pool.num_free, pool.ref_counts) == (0, [1])


def test_blocks_that_were_never_out_go_before_those_worth_keeping() -> None:
    pool = BlockPool(4)
    for block_id in (pool.take(), pool.take()):
        pool.drop(block_id, is_worth_keeping=block_id == 0)
    assert [pool.take() for _ in range(4)] == [1, 2, 3, 0]


def test_references_beyond_the_first_are_counted() -> None:
    pool = BlockPool(2)
    for _ in range(2):
        pool.take()
    counts = [pool.num_shared]
    for change in (pool.hold, pool.hold, lambda block_id: pool.drop(block_id, is_worth_keeping=True)):
        change(1)
        counts.append(pool.num_shared)
    assert counts == [0, 1, 2, 1]
    pool.check_invariants([[0, 1], [1]])


def test_misuse_is_caught() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.drop(0, is_worth_keeping=True)
    pool.take()
    with pytest.raises(AssertionError, match="empty block pool"):
        pool.take()
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_invariants([])
