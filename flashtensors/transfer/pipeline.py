"""Moves planned bytes from files, or from the host tier, into an arena."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.chunk_digests import DIGEST_CHUNK_BYTES, DigestCheck
from ..errors import FlashError, TransferError
from ..memory.arena import Arena
from ..memory.host_pool import HostPool
from .block_reads import BlockReads
from .blocks import BlockList, make_blocks
from .crew import Progress
from .host_image import HostImage
from .in_place_load import InPlaceLoad
from .layer_events import LayerEvents
from .load_plan import LoadPlan
from .page_source import PageSource
from .paged_load import PagedLoad
from .readers.automatic import AutomaticReader
from .readers.buffered import BufferedReader
from .readers.files import OpenReader, Reader

CHUNK_SIZE = 16 * 1024**2
"""Bytes of a chunk, where the caller does not say: long enough for the link, short enough to begin early."""

NUM_THREADS = 4
"""Threads that read, where the caller does not say."""

RING_PAGES_PER_THREAD = 2
"""Pages of a ring: while one of a thread's is copied from, the thread reads to the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """What a load took."""

    num_bytes: int
    """Bytes of the plan's files that are in the arena now."""
    phase_seconds: dict[str, float]
    """Wall seconds by phase: `prepare` (files opened, ring pinned), `read` (until all is in the arena)."""
    reader: str
    """How files were read: `direct`, `buffered`, both, or `none` where the host tier had everything."""
    host_tier_bytes: int = 0
    """Bytes that came from the host tier."""
    num_checked: int = 0
    """Chunks whose digest was compared with what was known."""

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes moved per second of all phases, in units of 10^9."""
        return self.num_bytes / max(sum(self.phase_seconds.values()), 1e-9) / 1e9


def load(
    plan: LoadPlan,
    arena: Arena,
    *,
    num_threads: int = NUM_THREADS,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    open_reader: OpenReader | None = None,
    pool: HostPool | None = None,
    image: HostImage | None = None,
    check: DigestCheck | None = None,
    events: LayerEvents | None = None,
    on_near: Callable[[], None] | None = None,
) -> LoadStats:
    """Fill `arena` with the plan's tensors; returns when every byte is there.

    Args:
        plan: What to load; the files must not have changed since it was made.
        arena: At least `plan.num_bytes` long. Borrowed; undefined after an error.
        num_threads: Threads that read. 16 saturate a link of 55 GB/s from the page cache.
        chunk_size: Bytes of a file that are copied at once, at least 4096; with a pool, the pool's. With `check`, a
            multiple of its chunks.
        progress: Called on the caller's thread with bytes done and bytes in all, a few times a second and at the end.
        cancel: Set it to make the load raise soon.
        open_reader: How to read files; None: as `find_reader` says.
        pool: Gives the pages that files are read to on their way to a device; None: they are pinned for this load.
        image: The plan in the host tier: what it has is not read again, and what is read stays in it while its pool
            has pages.
        check: Digests that what is read must have; it remembers those that were not known.
        events: Told when each layer has landed.
        on_near: Called once, on the caller's thread, when every byte is there, or its copy is queued or soon will be;
            what it raises ends the load.

    Raises:
        TruncatedFile: A file ends too early.
        DigestMismatch: A file has other bytes than it had.
        FileChanged: A file is gone, or was replaced since it was planned.
        CheckpointError: A file cannot be opened.
        UnsupportedModel: Values do not fit float16.
        CapacityError: No room for pages.
        TransferError: A read or a copy failed, or the load was cancelled.
    """
    assert arena.num_bytes >= plan.num_bytes, f"{plan.num_bytes} bytes do not fit an arena of {arena.num_bytes}"
    run = _Load(plan, arena, num_threads, open_reader, pool, image, check, events, cancel, on_near)
    return run.run(chunk_size, progress)


def fill_image(
    image: HostImage,
    *,
    num_threads: int = NUM_THREADS,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    open_reader: OpenReader | None = None,
    check: DigestCheck | None = None,
) -> LoadStats:
    """Read into `image` what it lacks, in the order of execution, until its pool has no pages left.

    Arguments and errors are those of `load`; what was read before an error stays in the image.
    """
    run = _Load(image.plan, None, num_threads, open_reader, None, image, check, None, cancel)
    return run.run(image.pool.chunk_bytes, progress)


def find_reader(*, is_in_place: bool) -> OpenReader:
    """How files are read: to their place on a CPU through the page cache, else directly what that does not hold."""
    return BufferedReader if is_in_place else AutomaticReader


@dataclass(slots=True)
class _Load:
    plan: LoadPlan
    arena: Arena | None
    num_threads: int
    open_reader: OpenReader | None
    pool: HostPool | None
    image: HostImage | None
    check: DigestCheck | None
    events: LayerEvents | None
    cancel: threading.Event | None
    on_near: Callable[[], None] | None = None

    def run(self, chunk_size: int, progress: Progress | None) -> LoadStats:
        started = time.perf_counter()
        num_checked = self._num_checked
        block_list = self._find_blocks(chunk_size)
        if self.events is not None:
            self.events.begin(block_list.last_stages)
        missing = _missing_blocks(block_list, self.image)
        try:
            with ExitStack() as stack:
                reader = stack.enter_context(self._open_reader()(self.plan.files)) if missing else _NoReader()
                load = self._make_load(block_list, missing, reader, stack)
                prepared = time.perf_counter()
                load.run(self.num_threads, progress, self.plan.file_bytes)
        except Exception as error:
            if self.events is not None:
                self.events.fail(error if isinstance(error, FlashError) else TransferError(f"the load failed: {error}"))
            raise
        if isinstance(load, InPlaceLoad):
            if self.events is not None:
                self.events.landed(block_list.num_stages, None)
            if self.on_near is not None:
                self.on_near()
        read_bytes = sum(block_list.blocks[index].used_bytes for index in missing)
        return LoadStats(
            num_bytes=self.plan.file_bytes,
            phase_seconds={"prepare": prepared - started, "read": time.perf_counter() - prepared},
            reader=reader.name,
            host_tier_bytes=self.plan.file_bytes - read_bytes,
            num_checked=self._num_checked - num_checked,
        )

    @property
    def _num_checked(self) -> int:
        return self.check.num_checked if self.check is not None else 0

    @property
    def _is_in_place(self) -> bool:
        is_host = self.arena is not None and self.arena.device.type == "cpu"
        return is_host and self.pool is None and self.image is None

    def _find_blocks(self, chunk_size: int) -> BlockList:
        if self.image is not None:
            assert self.image.plan == self.plan, "the image is of another plan"
            return self.image.block_list
        if self.pool is not None:
            return make_blocks(self.plan, self.pool.chunk_bytes)
        unit = 4096 if self.check is None else DIGEST_CHUNK_BYTES
        return make_blocks(self.plan, max(unit, chunk_size // unit * unit))

    def _open_reader(self) -> OpenReader:
        return self.open_reader or find_reader(is_in_place=self._is_in_place)

    def _make_load(
        self, block_list: BlockList, missing: list[int], reader: Reader, stack: ExitStack
    ) -> InPlaceLoad | PagedLoad:
        assert self.check is None or block_list.chunk_bytes % DIGEST_CHUNK_BYTES == 0, "pages cut chunks of digests"
        cancel = self.cancel or threading.Event()
        if self._is_in_place:
            assert self.arena is not None
            return InPlaceLoad(block_list, self.arena, reader=reader, check=self.check, cancel=cancel)
        pool = self.pool or (self.image.pool if self.image is not None else None)
        if pool is not None:
            stack.enter_context(pool.go_first())
        pages = PageSource(
            pool=pool,
            image=self.image,
            num_pages=len(missing),
            ring_pages=RING_PAGES_PER_THREAD * self.num_threads + 1 if self.arena is not None else 0,
            chunk_bytes=block_list.chunk_bytes,
            device=self.arena.device if self.arena is not None else torch.device("cpu"),
        )
        stack.enter_context(pages)
        reads = BlockReads(block_list.blocks, missing, pages=pages, reader=reader, check=self.check, image=self.image)
        return PagedLoad(
            block_list,
            self.arena,
            reads=reads,
            pages=pages,
            events=self.events,
            cancel=cancel,
            on_near=self.on_near,
        )


def _missing_blocks(block_list: BlockList, image: HostImage | None) -> list[int]:
    """Indexes of the blocks that have to be read."""
    return [index for index in range(len(block_list.blocks)) if image is None or image.find(index) is None]


class _NoReader:
    """Stands in where nothing is left to read."""

    name = "none"

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        raise AssertionError(f"{path} is in the host tier")
