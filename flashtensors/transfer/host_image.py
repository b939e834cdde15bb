"""A model in the host tier: the chunks of its files, kept in the pages that they were read to.

Weights never change, so the pages are the model: copying them to the device again needs no disk, and dropping some
costs only the reading of those chunks when the model is wanted again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Self

from ..closing import Closing
from ..errors import CapacityError
from ..memory.host_pool import HostPool, Page
from .blocks import BlockList, make_blocks
from .load_plan import LoadPlan


class HostImage(Closing):
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
        self._max_pages = len(self.block_list.blocks)
        self._num_taken = 0
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
        try:
            for block, index in page_indexes.items():
                image._pages[block] = pool.claim(index)
                image._num_taken += 1
        except CapacityError:
            image.close()
            raise
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

    def grow_to(self, num_bytes: int) -> None:
        """Bound what the image may hold from now on; what it holds already stays."""
        with self._lock:
            self._max_pages = min(num_bytes // self.pool.page_bytes, len(self.block_list.blocks))

    @property
    def room_bytes(self) -> int:
        """Bytes that it could still take, as far as its bound and its pool go."""
        with self._lock:
            num_pages = max(0, self._max_pages - self._num_taken)
        return min(num_pages * self.pool.page_bytes, self.pool.free_bytes)

    def take_page(self) -> Page | None:
        """A page to read a block to, waiting for it while the pool is being made; None at the bound."""
        with self._lock:
            if self._num_taken >= self._max_pages:
                return None
            self._num_taken += 1
        page = self.pool.allocate()
        if page is None:
            with self._lock:
                self._num_taken -= 1
        return page

    def put_page(self, page: Page) -> None:
        """Give back a page that was taken and does not hold a block."""
        with self._lock:
            self._num_taken -= 1
        self.pool.give_back(page)

    def keep(self, block: int, page: Page) -> None:
        """Hold a block that was read to a page that was taken."""
        with self._lock:
            assert block not in self._pages, f"block {block} is there already"
            self._pages[block] = page

    def cut_tail(self, num_bytes: int) -> list[Page]:
        """Let go of at least `num_bytes`, the last layers first, less where there are less.

        The pages are the caller's, to give back to the pool. No load from the image may be under way.
        """
        num_pages = -(-num_bytes // self.pool.page_bytes)
        with self._lock:
            blocks = sorted(self._pages, reverse=True)[:num_pages]
            self._num_taken -= len(blocks)
            return [self._pages.pop(block) for block in blocks]

    def drop_tail(self, num_bytes: int) -> int:
        """As `cut_tail`, and give the pages back; returns how many bytes."""
        pages = self.cut_tail(num_bytes)
        for page in pages:
            self.pool.give_back(page)
        return len(pages) * self.pool.page_bytes

    def close(self) -> None:
        """Give back every page."""
        self.drop_tail(self.num_bytes)
