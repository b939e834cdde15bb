"""How much host memory there is, and how much of it the pool takes. Needs no torch: the daemon asks too."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import Settings

POOL_SHARE = 0.5
"""Share of the memory that is available which the host pool takes where `mem_pool_size` is not set."""
MAX_POOL_SHARE = 0.8
"""Most of the available memory that it takes, whatever is set: pinned memory is never swapped out."""
EMBEDDED_POOL_BYTES = 1024**3
"""The pool of an embedded engine where nothing is set: pages that weights pass through on their way."""


def find_pool_bytes(settings: Settings, *, is_embedded: bool) -> int:
    """Bytes of the host pool of a worker on a GPU, which is also the length of the daemon's memory file for it."""
    available_bytes = available_host_bytes()
    most_bytes = int(available_bytes * MAX_POOL_SHARE)
    if settings.mem_pool_size is not None:
        return min(settings.mem_pool_size, most_bytes)
    return min(EMBEDDED_POOL_BYTES, most_bytes) if is_embedded else int(available_bytes * POOL_SHARE)


def available_host_bytes() -> int:
    """Memory that this process could take without swapping: the system's, bounded by its control group."""
    try:
        system_bytes = _proc_value(Path("/proc/meminfo").read_text(encoding="ascii"), "MemAvailable:") * 1024
    except OSError:  # no procfs: macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used_bytes = _proc_value((group / "memory.stat").read_text(encoding="ascii"), "anon")
    except OSError:  # no control group of version 2, or none with a memory controller
        return system_bytes
    return system_bytes if limit == "max" else min(system_bytes, max(0, int(limit) - used_bytes))


def _proc_value(text: str, key: str) -> int:
    fields = (line.split() for line in text.splitlines())
    return next(int(field[1]) for field in fields if field[0] == key)
