"""How a load would read a model now, found out in a process of its own: only there torch is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..config import Settings
from ..errors import FlashError, WorkerError

TIMEOUT_S = 120.0


class ReadPreview(msgspec.Struct, frozen=True, kw_only=True):
    """Readers of one model's files, as far as no host tier holds them."""

    num_bytes: dict[str, int]
    """Of the files that are used, by reader: `mmap`, `direct`, `buffered`."""
    reason: str
    """Why, for people."""


def ask_preview(settings: Settings, folder: Path) -> ReadPreview:
    """`preview_load` in a process of its own, which takes as long as torch takes to import.

    Raises:
        WorkerError: The process failed; the message is what it said last.
    """
    command = [sys.executable, "-m", __name__, str(folder)]
    try:
        result = subprocess.run(
            command, input=msgspec.json.encode(settings), capture_output=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise WorkerError(f"{folder}: how it is read was not found out within {TIMEOUT_S:.0f} s") from error
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise WorkerError(lines[-1] if lines else f"{command} ended with status {result.returncode}")
    return msgspec.json.decode(result.stdout, type=ReadPreview)


def preview_load(settings: Settings, folder: Path) -> ReadPreview:
    """Plan the model in `folder` as a load does, and ask the readers that it would use; no weight is read.

    Raises:
        CheckpointError: The files are no sound model.
        ConfigError: A device that is not there.
    """
    from ..transfer.mapped import map_weights
    from ..transfer.read_preview import preview_reads
    from .checkpoint_loader import plan_files
    from .device import find_cuda_index
    from .harbour import find_chunk_bytes

    is_cpu = find_cuda_index(settings) is None
    _, _, plan = plan_files(folder, None, is_cpu=is_cpu)
    chunk_bytes = find_chunk_bytes(settings)
    if not is_cpu:
        num_bytes = preview_reads(plan, is_in_place=False, chunk_bytes=chunk_bytes)
        return ReadPreview(num_bytes=num_bytes, reason=_explain_files(list(plan.files), num_bytes))
    rest = map_weights(plan).rest
    mapped_bytes = plan.file_bytes - rest.file_bytes
    num_bytes = {"mmap": mapped_bytes} if mapped_bytes else {}
    num_bytes |= preview_reads(rest, is_in_place=True, chunk_bytes=chunk_bytes)
    return ReadPreview(
        num_bytes=num_bytes,
        reason="on a CPU weights are used where they lie in their files, but for those that are fused, converted or "
        "not aligned",
    )


def _explain_files(paths: Sequence[Path], num_bytes: dict[str, int]) -> str:
    from ..transfer.probe import shared_probe
    from ..transfer.readers.page_cache import PageCache

    found = [shared_probe().file_system(path) for path in paths]
    reasons = list(dict.fromkeys(file_system.reason for file_system in found))
    if any(file_system.accepts_direct for file_system in found) and "buffered" in num_bytes:
        reasons.append("what the page cache holds is read from it")
    if "direct" in num_bytes and any(PageCache().find_file_share(path) is None for path in paths):
        reasons.append(
            "the kernel does not say what the page cache holds of files that this user neither owns nor may write, so "
            "they are read from the disk"
        )
    return ", ".join(reasons)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the preview of the folder that is the argument, for settings on standard input, both as JSON."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    try:
        preview = preview_load(msgspec.json.decode(sys.stdin.buffer.read(), type=Settings), Path(folder))
    except FlashError as error:
        print(error.message, file=sys.stderr)
        return 1
    print(msgspec.json.encode(preview).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
