"""Checks of what the bytes of models pass through: files, page cache, host memory, compiled kernels. Without torch."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.catalog import Catalog
from ..config import Settings
from ..errors import FlashError
from ..kernels.binaries import list_binaries
from ..worker.host_memory import available_host_bytes, find_pool_bytes
from ..worker.read_preview import ask_preview
from .finding import Finding
from .output import size_text

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def check_reader(settings: Settings) -> Finding:
    """Which reader a load would use now for the largest model of the store, and why."""
    try:
        records = Catalog(settings.store).list()
    except FlashError as error:
        return Finding("reader", "error", error.message)
    if not records:
        return Finding("reader", "ok", "no model in the store yet: chosen when one is loaded")
    record = max(records, key=lambda record: record.num_bytes)
    try:
        preview = ask_preview(settings, record.path)
    except FlashError as error:
        return Finding("reader", "error", f"{record.name}: {error.message}")
    readers = " and ".join(f"{name} for {size_text(num_bytes)}" for name, num_bytes in preview.num_bytes.items())
    return Finding("reader", "ok", f"{readers} of {record.name}: {preview.reason}")


def check_host_pool(settings: Settings) -> Finding:
    """How much host memory a worker on a GPU takes for models."""
    pool_bytes, available_bytes = find_pool_bytes(settings, is_embedded=False), available_host_bytes()
    text = f"{size_text(pool_bytes)} of {size_text(available_bytes)} available, where there is a GPU (mem_pool_size)"
    if "[never]" in _read(_HUGE_PAGES):
        return Finding("host pool", "warning", f"{text}; huge pages are off, so it takes longer to make")
    if settings.mem_pool_size is not None and pool_bytes < settings.mem_pool_size:
        return Finding("host pool", "warning", f"{text}; {size_text(settings.mem_pool_size)} were asked for")
    return Finding("host pool", "ok", text)


def check_kernels(settings: Settings) -> Finding:
    """Which compiled kernels are on disk."""
    folders = list_binaries(settings.kernel_store)
    if not folders:
        return Finding(
            "kernels", "ok", "none compiled yet: that is done when a model is registered with a worker on a GPU"
        )
    texts = [f"{folder.num_kernels} for {folder.name} ({size_text(folder.num_bytes)})" for folder in folders]
    return Finding("kernels", "ok", ", ".join(texts))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
