"""Who holds which physical KV cache block."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Reference counts of the KV cache blocks, and the order in which free ones are handed out. All O(1).

    Free blocks go out in this order: those whose content is worth nothing, the last one back first; those that were
    never out, by number; those whose content is worth keeping, the first one back first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        self.num_shared = 0
        """References beyond the first of each block: 0 where nothing is shared."""
        self._num_touched = 0  # blocks from here on were never out
        self._worthless: list[int] = []
        self._worthy: OrderedDict[int, None] = OrderedDict()

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return len(self.ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._worthless) + len(self.ref_counts) - self._num_touched + len(self._worthy)

    def take(self) -> int:
        """The free block that is first in line, now held once. The caller has looked at `num_free`."""
        if self._worthless:
            block_id = self._worthless.pop()
        elif self._num_touched < len(self.ref_counts):
            block_id = self._num_touched
            self._num_touched += 1
        else:
            assert self._worthy, "take() from an empty block pool"
            block_id, _ = self._worthy.popitem(last=False)
        self.ref_counts[block_id] = 1
        return block_id

    def hold(self, block_id: int) -> None:
        """Hold a block once more: one that is held, or a free one that is worth keeping, which leaves the line."""
        if self.ref_counts[block_id] == 0:
            del self._worthy[block_id]
        else:
            self.num_shared += 1
        self.ref_counts[block_id] += 1

    def drop(self, block_id: int, *, is_worth_keeping: bool) -> None:
        """Hold a block once less; one that nobody holds joins the line."""
        assert self.ref_counts[block_id] > 0, f"block {block_id} is dropped more often than held"
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] > 0:
            self.num_shared -= 1
        elif is_worth_keeping:
            self._worthy[block_id] = None
        else:
            self._worthless.append(block_id)

    def expire(self, block_id: int) -> None:
        """Say that a block's content is no longer worth keeping; a free one moves to the front of the line."""
        if block_id in self._worthy:
            del self._worthy[block_id]
            self._worthless.append(block_id)

    def check_invariants(self, holders: Iterable[list[int]]) -> None:
        """Recount every reference from the block tables of all `holders`; for tests."""
        recount = Counter(block_id for block_ids in holders for block_id in block_ids)
        assert self.ref_counts == [recount[block_id] for block_id in range(self.num_blocks)], "reference counts drifted"
        assert self.num_shared == recount.total() - len(recount), "shared references drifted"
        free = [*self._worthless, *range(self._num_touched, self.num_blocks), *self._worthy]
        assert sorted(free) == [b for b, count in enumerate(self.ref_counts) if count == 0], "free line drifted"
