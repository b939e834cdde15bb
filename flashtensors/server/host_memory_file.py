"""The memory file that holds models in host memory: the daemon owns it, so that they outlive a worker that dies."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Iterator

from ..config import Settings
from ..worker.host_memory import find_pool_bytes

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_host_memory_file(settings: Settings) -> Iterator[int | None]:
    """A memory file for every worker of this daemon to inherit; None where no worker would use one.

    It takes no memory until a worker touches its pages, and is gone with the last process that has it open.
    """
    if settings.device == "cpu" or not hasattr(os, "memfd_create"):
        yield None
        return
    num_bytes = find_pool_bytes(settings, is_embedded=False) // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        fd = os.memfd_create("flashtensors-models")
    except OSError as error:
        _log.warning("no memory file: %s; a worker that is started again reads its models from disk", error)
        yield None
        return
    try:
        os.truncate(fd, num_bytes)
        yield fd
    finally:
        os.close(fd)
