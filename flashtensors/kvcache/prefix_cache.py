"""Finds KV cache blocks that already hold a prompt's beginning.

A tree with one node for each full block: the path from the root spells the tokens, so two prefixes meet at a node only
when they are equal, token for token. Blocks that nobody holds stay in the tree until their memory is wanted, the least
recently released first. A sequence releases its last block first, so a tree loses its leaves before its roots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .blocks import BlockPool

TokenBlock = tuple[int, ...]


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A prefix that ends at a block's edge, and the block that holds its last tokens."""

    block_id: int
    """-1 for the root, the empty prefix."""
    token_ids: TokenBlock = ()
    parent: PrefixNode | None = None
    children: dict[TokenBlock, PrefixNode] = field(default_factory=dict)
    is_cached: bool = True
    """False once the block was given away; such a node never comes back to life."""


class PrefixCache:
    """KV cache blocks, handed out and shared by content.

    Args:
        num_blocks: Physical blocks, ids 0 … num_blocks - 1.
        block_size: Tokens in a block.
        is_enabled: False makes `find` find nothing and `insert` keep nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, *, is_enabled: bool = True) -> None:
        self.block_size = block_size
        self.is_enabled = is_enabled
        self.pool = BlockPool(num_blocks)
        self.root = PrefixNode(block_id=-1)
        self.num_changes = 0
        """Grows whenever blocks come back or become findable: a sequence that found no room need not look before."""
        self._nodes: dict[int, PrefixNode] = {}  # by block

    def find(self, token_ids: Sequence[int]) -> list[PrefixNode]:
        """Nodes of the longest cached prefix, root side first, without the root.

        At least one token is always left over: the last one must be computed for there to be logits. The nodes are
        not held yet; `hold` their blocks before anything is allocated.
        """
        found: list[PrefixNode] = []
        node, size = self.root, self.block_size
        for end in range(size, len(token_ids), size):
            child = node.children.get(tuple(token_ids[end - size : end]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def hold(self, nodes: Iterable[PrefixNode]) -> list[int]:
        """Share the blocks of `nodes`; the caller releases the block ids that it gets."""
        block_ids = [node.block_id for node in nodes]
        for block_id in block_ids:
            self.pool.hold(block_id)
        return block_ids

    def allocate(self) -> int:
        """A block for new content; whatever prefix it held is forgotten. The caller has looked at `pool.num_free`."""
        block_id = self.pool.take()
        node = self._nodes.get(block_id)
        if node is not None:
            self._forget(node)
        return block_id

    def insert(self, parent: PrefixNode, token_ids: TokenBlock, block_id: int) -> PrefixNode | None:
        """Make a full block findable as the continuation of `parent`.

        Steps run in order, so a block may be inserted as soon as the step that fills it is being planned.

        Returns:
            The node of the continued prefix, which is another block's when that prefix is known already; None when
            the cache is off or `parent` is no longer cached, and nothing below it can be found any more.
        """
        assert len(token_ids) == self.block_size, f"a block of {len(token_ids)} tokens, not {self.block_size}"
        if not (self.is_enabled and parent.is_cached):
            return None
        node = parent.children.get(token_ids)
        if node is None:
            node = PrefixNode(block_id, token_ids, parent)
            parent.children[token_ids] = self._nodes[block_id] = node
            self.num_changes += 1
        return node

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back a sequence's blocks, in the order of its block table."""
        for block_id in reversed(block_ids):
            self.pool.drop(block_id, is_worth_keeping=block_id in self._nodes)
        self.num_changes += 1

    def forget(self, token_ids: Sequence[int]) -> None:
        """Find no prefix of `token_ids` any more, nor what continues one: their content cannot be relied on."""
        node = self.root.children.get(tuple(token_ids[: self.block_size]))
        if node is not None:
            self._forget(node)

    def _forget(self, node: PrefixNode) -> None:
        """Cut a node off with all that continues it: without it, they can no longer be found."""
        assert node.parent is not None, "the root is never forgotten"
        del node.parent.children[node.token_ids]
        doomed = [node]
        while doomed:
            node = doomed.pop()
            node.is_cached = False
            del self._nodes[node.block_id]
            self.pool.expire(node.block_id)
            doomed.extend(node.children.values())

    def check_invariants(self, holders: Iterable[list[int]]) -> None:
        """Walk the whole tree and recount all references; for tests."""
        self.pool.check_invariants(holders)
        seen, pending = 0, [self.root]
        while pending:
            node = pending.pop()
            assert node.is_cached, "a forgotten node is still in the tree"
            for token_ids, child in node.children.items():
                assert (child.parent, child.token_ids) == (node, token_ids), "a node hangs in the wrong place"
                assert self._nodes[child.block_id] is child, "two prefixes claim one block"
            seen += len(node.children)
            pending.extend(node.children.values())
        assert seen == len(self._nodes), "a cached block is not in the tree"
