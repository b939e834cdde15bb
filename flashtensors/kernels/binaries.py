"""Compiled kernels on disk, so that no process compiles what another one has, and compiling many at once.

Triton keys a binary by the kernel's source, its own version, the compiler's and the device; what is kept here is one
folder for each pair of Triton and device, so that old ones can be told apart and removed. Needs neither torch nor
triton until something is compiled.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BinaryFolder:
    """Binaries of one Triton and device generation."""

    name: str
    num_kernels: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What `warm` did."""

    num_calls: int
    num_compiled: int
    """Binaries that were not on disk before."""
    elapsed_s: float


def folder_for(root: Path, *, triton_version: str, capability: tuple[int, int]) -> Path:
    """Where binaries for this Triton and device lie under `root`; the folder need not exist."""
    return root / f"triton-{triton_version}-sm{capability[0]}{capability[1]}"


def keep_binaries_in(root: Path, capability: tuple[int, int]) -> Path:
    """Make this process read and write binaries under `root`; call it before the first kernel runs.

    Kernels of this process may fuse products and sums, as they always did: Triton 3.9 warns where nobody says so.

    Returns:
        The folder, made where it was not there.
    """
    import triton
    import triton.knobs

    folder = folder_for(root, triton_version=triton.__version__, capability=capability)
    folder.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(folder)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    return folder


def list_binaries(root: Path) -> list[BinaryFolder]:
    """What lies under `root`, by name; empty where nothing was compiled yet."""
    if not root.is_dir():
        return []
    return [_read(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]


def warm(calls: Sequence[Callable[[], object]], folder: Path, *, num_threads: int) -> WarmReport:
    """Run `calls` side by side, each of which launches kernels on small inputs, so that all are compiled and loaded.

    The compiler lets other threads run, so calls should launch different kernels. The first error is raised when all
    have ended. Not while a CUDA graph is captured: loading a binary would break the capture.

    Args:
        calls: For a model's steps, of `runner/rehearsal.py`.
        folder: Of `keep_binaries_in`.
        num_threads: Calls that run at a time.
    """
    before, begin = _read(folder).num_kernels, time.monotonic()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="warm-kernels") as executor:
        futures = [executor.submit(call) for call in calls]
    for future in futures:
        future.result()
    return WarmReport(
        num_calls=len(calls),
        num_compiled=_read(folder).num_kernels - before,
        elapsed_s=time.monotonic() - begin,
    )


def is_warmed(folder: Path, what: bytes) -> bool:
    """Whether `note_warmed` was called for this, and no source has changed since."""
    return _note_path(folder, what).exists()


def note_warmed(folder: Path, what: bytes) -> None:
    """Note in `folder` that everything is compiled that `what` describes."""
    path = _note_path(folder, what)
    path.parent.mkdir(exist_ok=True)
    path.touch()


def _note_path(folder: Path, what: bytes) -> Path:
    package, digest = Path(__file__).parents[1], hashlib.blake2b(what, digest_size=16)
    for path in sorted(package.rglob("*.py")):
        status = path.stat()
        digest.update(f"{path.relative_to(package)} {status.st_size} {status.st_mtime_ns}".encode())
    return folder / "warmed" / digest.hexdigest()


def _read(folder: Path) -> BinaryFolder:
    sizes = [(path.suffix, path.stat().st_size) for path in folder.rglob("*") if path.is_file()]
    return BinaryFolder(
        name=folder.name,
        num_kernels=sum(suffix == ".cubin" for suffix, _ in sizes),
        num_bytes=sum(size for _, size in sizes),
    )
