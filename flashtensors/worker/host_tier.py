"""The host tier: models whose files lie in pinned memory, whole or their first layers, ready to be copied."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from ..errors import CapacityError
from ..memory.host_pool import PAGE_SLACK_BYTES, HostPool, Page
from ..memory.pinning import Pinning
from ..transfer.host_image import HostImage
from ..transfer.load_plan import LoadPlan
from .host_index import HostIndex, IndexedImage


class HostTier:
    """The images of one worker's models, by name, in one pool. Any number of threads may use it.

    Images grow while their models are loaded; who may hold how much is decided elsewhere. Some pages stay outside the
    account, so that a load of which nothing is kept has pages to read to.

    Args:
        pool: Where the pages are; the tier closes it. None: there is no host tier, and its capacity is 0.
        ring_pages: Pages that images never get.
        index: Where to note what is held, for a worker that starts after this one; None: nowhere.
        left: What an earlier worker noted; the pool has reserved its pages.
    """

    def __init__(
        self,
        pool: HostPool | None,
        *,
        ring_pages: int = 0,
        index: HostIndex | None = None,
        left: Mapping[str, IndexedImage] | None = None,
    ) -> None:
        self.pool = pool
        self.capacity_bytes = 0 if pool is None else max(0, pool.num_pages - ring_pages) * pool.page_bytes
        """Bytes that images may hold together."""
        self._index = index
        self._images: dict[str, HostImage] = {}
        self._left = dict(left or {})
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        num_bytes: int,
        *,
        chunk_bytes: int,
        ring_pages: int,
        pinning: Pinning | None,
        num_threads: int,
        fd: int | None = None,
    ) -> HostTier:
        """A tier over a new pool, which is made in the background, or over what a memory file holds.

        Args:
            num_bytes: Of the pool; with `fd`, the length of the file counts.
            chunk_bytes: Bytes of a file in one page.
            ring_pages: Pages that images never get.
            pinning: Registers the memory with the device.
            num_threads: Threads that make the pool.
            fd: A memory file that outlives this process; borrowed while the call lasts.

        Raises:
            CapacityError: The system does not give that much.
        """
        index = None if fd is None else HostIndex(fd, chunk_bytes)
        num_bytes = num_bytes if index is None else index.pool_bytes
        left = {} if index is None else _find_sound(index.read(), num_bytes // (chunk_bytes + PAGE_SLACK_BYTES))
        pool = HostPool(
            num_bytes,
            chunk_bytes=chunk_bytes,
            pinning=pinning,
            num_threads=num_threads,
            fd=fd,
            reserved=[page for image in left.values() for page in image.pages.values()],
        )
        return cls(pool, ring_pages=ring_pages, index=index, left=left)

    def names(self) -> Collection[str]:
        """Models of which something is held."""
        with self._lock:
            return [name for name in (*self._left, *self._images) if self.held_bytes(name) > 0]

    def held_bytes(self, model: str) -> int:
        """Bytes that `model` holds."""
        with self._lock:
            left = self._left.get(model)
            if left is not None and self.pool is not None:
                return len(left.pages) * self.pool.page_bytes
            image = self._images.get(model)
            return 0 if image is None else image.num_bytes

    def open_image(self, model: str, plan: LoadPlan) -> HostImage:
        """The image of `model`, with what is held of it; what is held of another plan is dropped.

        May wait until pages that an earlier process left are registered again.
        """
        assert self.pool is not None, "there is no host tier"
        image = self._images.get(model)
        if image is not None and image.plan == plan:
            return image
        image = self._restore(model, plan, self.pool)
        with self._lock:
            self._images[model] = image
            self.note()
        return image

    def trim(self, model: str, keep_bytes: int) -> int:
        """Free the last layers beyond `keep_bytes`; returns what is still held. Nothing of the model moves now."""
        with self._lock:
            if model in self._left and self.held_bytes(model) > keep_bytes:
                self._drop_left(model)  # nobody has planned it since the start: it is not worth splitting
            image = self._images.get(model)
            if image is not None and image.num_bytes > keep_bytes:
                self._release(image.cut_tail(image.num_bytes - keep_bytes))
            return self.held_bytes(model)

    def drop(self, model: str) -> None:
        """Free all that `model` holds, and forget it. Nothing of it moves now."""
        with self._lock:
            self._drop_left(model)
            self._release_image(model)

    def note(self) -> None:
        """Write down what is held now; what grew since the last note would be lost with the process."""
        with self._lock:
            if self._index is not None:
                held = {
                    model: IndexedImage(image.plan.identity, image.page_indexes)
                    for model, image in self._images.items()
                    if image.num_bytes > 0
                }
                self._index.write(self._left | held)

    def close(self) -> None:
        """Unregister the memory; what a memory file holds stays in it."""
        with self._lock:
            self._images.clear()
            if self.pool is not None:
                self.pool.close()

    def _restore(self, model: str, plan: LoadPlan, pool: HostPool) -> HostImage:
        with self._lock:
            self._release_image(model)
            left = self._left.get(model)
            if left is None or left.identity != plan.identity:
                self._drop_left(model)
                return HostImage(plan, pool)
        try:
            image = HostImage.restore(plan, pool, left.pages)
        except CapacityError:  # the pool could not be made as far as it was before
            image = HostImage(plan, pool)
        with self._lock:
            self._left.pop(model, None)
        return image

    def _release_image(self, model: str) -> None:
        image = self._images.pop(model, None)
        if image is not None:
            self._release(image.cut_tail(image.num_bytes))

    def _release(self, pages: list[Page]) -> None:
        """Give pages back, after the note has forgotten them: nobody may find other bytes in them."""
        assert self.pool is not None
        self.note()
        for page in pages:
            self.pool.give_back(page)

    def _drop_left(self, model: str) -> None:
        left = self._left.pop(model, None)
        if left is not None and self.pool is not None:
            self.note()
            self.pool.free_reserved(left.pages.values())


def _find_sound(images: Mapping[str, IndexedImage], num_pages: int) -> dict[str, IndexedImage]:
    """Those images that name pages of the pool, and none that another one names."""
    sound: dict[str, IndexedImage] = {}
    seen: set[int] = set()
    for model, image in images.items():
        pages = set(image.pages.values())
        if len(pages) == len(image.pages) and pages.isdisjoint(seen) and pages <= set(range(num_pages)):
            sound[model] = image
            seen |= pages
    return sound
