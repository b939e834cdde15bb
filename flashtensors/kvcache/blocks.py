"""Who holds which physical KV cache block."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Reference counts of the KV cache blocks, and the order in which free ones are handed out. All O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first out at the front

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return len(self.ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """The free block that is first in line, now held once. The caller has looked at `num_free`."""
        assert self._free, "take() from an empty block pool"
        block_id, _ = self._free.popitem(last=False)
        self.ref_counts[block_id] = 1
        return block_id

    def hold(self, block_id: int) -> None:
        """Hold a block once more; a free one leaves the line."""
        if self.ref_counts[block_id] == 0:
            del self._free[block_id]
        self.ref_counts[block_id] += 1

    def drop(self, block_id: int, *, is_worth_keeping: bool) -> None:
        """Hold a block once less. One that nobody holds joins the line: at its end when its content is worth keeping,
        at its front when not.
        """
        assert self.ref_counts[block_id] > 0, f"block {block_id} is dropped more often than held"
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            self._free[block_id] = None
            if not is_worth_keeping:
                self._free.move_to_end(block_id, last=False)

    def expire(self, block_id: int) -> None:
        """Say that a block's content is no longer worth keeping; a free one moves to the front of the line."""
        if self.ref_counts[block_id] == 0:
            self._free.move_to_end(block_id, last=False)

    def check_invariants(self, holders: Iterable[list[int]]) -> None:
        """Recount every reference from the block tables of all `holders`; for tests."""
        recount = Counter(block_id for block_ids in holders for block_id in block_ids)
        assert self.ref_counts == [recount[block_id] for block_id in range(self.num_blocks)], "reference counts drifted"
        assert set(self._free) == {b for b, count in enumerate(self.ref_counts) if count == 0}, "free line drifted"
