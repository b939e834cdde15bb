from __future__ import annotations

import random

import pytest

from flashtensors.kvcache.prefix_cache import PrefixCache, PrefixNode

Prefix = tuple[int, ...]


def fill(cache: PrefixCache, token_ids: list[int], *, is_blind: bool = False) -> list[int]:
    """Run a sequence through the cache as an engine does; its block ids.

    A blind one shares nothing, as when two sequences generate the same tokens side by side.
    """
    nodes = [] if is_blind else cache.find(token_ids)
    block_ids = cache.hold(nodes)
    node: PrefixNode | None = nodes[-1] if nodes else cache.root
    size = cache.block_size
    for start in range(len(nodes) * size, len(token_ids), size):
        block_ids.append(cache.allocate())
        chunk = tuple(token_ids[start : start + size])
        if node is not None and len(chunk) == size:
            node = cache.insert(node, chunk, block_ids[-1])
    return block_ids


def test_a_prompt_finds_the_blocks_of_an_equal_one_but_for_its_last_token() -> None:
    cache = PrefixCache(8, 2)
    block_ids = fill(cache, [1, 2, 3, 4])
    assert [node.block_id for node in cache.find([1, 2, 3, 4, 5])] == block_ids
    assert [node.block_id for node in cache.find([1, 2, 3, 4])] == block_ids[:1]
    assert cache.find([1, 2]) == []
    assert cache.find([2, 1, 3, 4, 5]) == []


def test_equal_blocks_after_different_beginnings_are_not_confused() -> None:
    cache = PrefixCache(8, 2)
    fill(cache, [1, 2, 7, 7])
    second = fill(cache, [3, 4, 7, 7])
    assert [node.block_id for node in cache.find([3, 4, 7, 7, 0])] == second
    assert cache.find([7, 7, 0]) == []


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
def test_nothing_is_found_of_what_is_forgotten(num_tokens: int) -> None:
    cache = PrefixCache(8, 2)
    token_ids = [1, 2, 3, 4, 5][:num_tokens]
    block_ids = fill(cache, token_ids)
    others = fill(cache, [9, 9])
    cache.forget(token_ids)
    assert cache.find([*token_ids, 0]) == []
    assert [node.block_id for node in cache.find([9, 9, 0])] == others
    cache.check_invariants([block_ids, others])


def test_free_blocks_stay_findable_until_they_are_wanted_and_leaves_go_first() -> None:
    cache = PrefixCache(3, 1)
    cache.release(fill(cache, [1, 2, 3]))
    assert len(cache.find([1, 2, 3, 0])) == 3
    for num_left in (2, 1, 0):
        cache.allocate()
        assert len(cache.find([1, 2, 3, 0])) == num_left


def test_the_least_recently_released_prefix_goes_first() -> None:
    cache = PrefixCache(4, 1)
    cache.release(fill(cache, [1, 2]))
    cache.release(fill(cache, [5, 6]))
    cache.release(cache.hold(cache.find([1, 2, 0])))
    cache.allocate()
    assert (len(cache.find([1, 2, 0])), len(cache.find([5, 6, 0]))) == (2, 1)


def test_a_forgotten_prefix_takes_its_continuations_along() -> None:
    cache = PrefixCache(4, 1)
    first = fill(cache, [1])
    twin = cache.allocate()  # computes the same token beside the first, and continues
    node = cache.insert(cache.root, (1,), twin)
    assert node is not None
    assert node.block_id == first[0]
    leaf_block = cache.allocate()
    leaf = cache.insert(node, (2,), leaf_block)
    assert leaf is not None
    cache.release(first)
    cache.allocate()
    assert cache.find([1, 2, 3]) != []  # the fourth block was free
    cache.allocate()
    assert cache.find([1, 2, 3]) == []
    assert (node.is_cached, leaf.is_cached) == (False, False)
    assert cache.insert(leaf, (3,), twin) is None


def test_a_cache_that_is_off_finds_nothing() -> None:
    cache = PrefixCache(4, 2, is_enabled=False)
    cache.release(fill(cache, [1, 2, 3, 4]))
    assert cache.find([1, 2, 3, 4, 5]) == []


def test_only_full_blocks_are_inserted() -> None:
    cache = PrefixCache(4, 2)
    with pytest.raises(AssertionError, match="a block of 1 tokens, not 2"):
        cache.insert(cache.root, (1,), cache.allocate())


class Twin:
    """The same cache as a dict of whole prefixes: slow, and plain to see."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.held: list[list[int]] = []
        self.cached: dict[Prefix, int] = {}
        self.worthless = set(range(num_blocks))
        self.worthy: list[int] = []  # free and cached, least recently released first

    def find(self, token_ids: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(self.block_size, len(token_ids), self.block_size):
            if tuple(token_ids[:end]) not in self.cached:
                break
            found.append(self.cached[tuple(token_ids[:end])])
        return found

    def fill(self, token_ids: list[int], block_ids: list[int], *, is_blind: bool) -> None:
        """Follow the cache, which chose `block_ids`, and object to a choice that it should not have made."""
        found = [] if is_blind else self.find(token_ids)
        assert block_ids[: len(found)] == found
        self.worthy = [block_id for block_id in self.worthy if block_id not in found]
        self.held.append(block_ids)
        for number in range(len(found), len(block_ids)):
            taken = block_ids[number]
            assert taken in self.worthless if self.worthless else taken == self.worthy[0]
            self.forget(taken)
            self.worthless.remove(taken)
            end = (number + 1) * self.block_size
            if end <= len(token_ids) and (
                end == self.block_size or tuple(token_ids[: end - self.block_size]) in self.cached
            ):
                self.cached.setdefault(tuple(token_ids[:end]), taken)

    def forget(self, evicted: int) -> None:
        gone = [prefix for prefix, block_id in self.cached.items() if block_id == evicted]
        for prefix in [p for p in self.cached if any(p[: len(g)] == g for g in gone)]:
            block_id = self.cached.pop(prefix)
            if block_id in self.worthy:
                self.worthy.remove(block_id)
                self.worthless.add(block_id)

    def release(self, block_ids: list[int]) -> None:
        self.held.remove(block_ids)
        for block_id in reversed(block_ids):
            if any(block_id in others for others in self.held):
                continue
            if block_id in self.cached.values():
                self.worthy.append(block_id)
            else:
                self.worthless.add(block_id)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_it_does_what_its_brute_force_twin_does(block_size: int) -> None:
    for seed in range(300):
        rng = random.Random(seed)
        num_blocks = rng.randint(4, 14)
        cache, twin = PrefixCache(num_blocks, block_size), Twin(num_blocks, block_size)
        held: list[list[int]] = []
        for _ in range(40):
            token_ids = [rng.randrange(2) for _ in range(rng.randint(1, num_blocks * block_size))]
            assert [node.block_id for node in cache.find(token_ids)] == twin.find(token_ids), f"seed {seed}"
            if rng.random() < 0.5 and cache.pool.num_free * block_size >= len(token_ids):
                is_blind = rng.random() < 0.3
                held.append(fill(cache, token_ids, is_blind=is_blind))
                twin.fill(token_ids, held[-1], is_blind=is_blind)
            elif held:
                block_ids = held.pop(rng.randrange(len(held)))
                cache.release(block_ids)
                twin.release(block_ids)
            cache.check_invariants(held)
            assert cache.pool.num_free == len(twin.worthless) + len(twin.worthy)
