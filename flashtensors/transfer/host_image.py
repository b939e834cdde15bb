"""A model in the host tier: the chunks of its files, kept in the pages that they were read to.

Weights never change, so the pages are the model: copying them to the device again needs no disk, and dropping some
costs only the reading of those chunks when the model is wanted again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from ..memory.host_pool import HostPool, Page
from .blocks import BlockList, make_blocks
from .load_plan import LoadPlan


class HostImage:
    """Chunks of one plan's files, by their place in the order of execution; any of them may be missing.

    `load` copies from the chunks that are there, reads the others, and keeps what it read while the pool has pages.

    Args:
        plan: Whose files; a load that uses the image has the same one.
        pool: Gives the pages; outlives the image.
    """

    def __init__(self, plan: LoadPlan, pool: HostPool) -> None:
        self.plan = plan
        self.pool = pool
        self.block_list: BlockList = make_blocks(plan, pool.chunk_bytes)
        self._pages: dict[int, Page] = {}
        self._lock = threading.Lock()

    @classmethod
    def restore(cls, plan: LoadPlan, pool: HostPool, page_indexes: Mapping[int, int]) -> Self:
        """The image that another process had in the same memory.

        Args:
            plan: Made from the same files, unchanged since.
            pool: Over the same memory file.
            page_indexes: What `page_indexes` said there.

        Raises:
            CapacityError: Somebody owns one of the pages.
        """
        image = cls(plan, pool)
        for block, index in page_indexes.items():
            image._pages[block] = pool.claim(index)
        return image

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool that the image holds."""
        return len(self._pages) * self.pool.page_bytes

    @property
    def full_num_bytes(self) -> int:
        """Bytes of the pool that it holds when it is complete."""
        return len(self.block_list.blocks) * self.pool.page_bytes

    @property
    def is_complete(self) -> bool:
        """Whether a load needs no disk."""
        return len(self._pages) == len(self.block_list.blocks)

    @property
    def page_indexes(self) -> dict[int, int]:
        """Index of the pool's page for each block that is there; see `restore`."""
        with self._lock:
            return {block: page.index for block, page in self._pages.items()}

    def find(self, block: int) -> Page | None:
        """The page that holds a block; None where it is missing."""
        return self._pages.get(block)

    def keep(self, block: int, page: Page) -> None:
        """Hold a block that was read to a page of the pool; the page is the image's from now on."""
        with self._lock:
            assert block not in self._pages, f"block {block} is there already"
            self._pages[block] = page

    def drop_tail(self, num_bytes: int) -> int:
        """Give back at least `num_bytes`, the last layers first; returns how many, less where there were less.

        No load from the image may be under way.
        """
        freed_bytes = 0
        with self._lock:
            for block in sorted(self._pages, reverse=True):
                if freed_bytes >= num_bytes:
                    break
                self.pool.give_back(self._pages.pop(block))
                freed_bytes += self.pool.page_bytes
        return freed_bytes

    def close(self) -> None:
        """Give back every page."""
        self.drop_tail(self.num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
