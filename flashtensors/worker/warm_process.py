"""A process that compiles kernels and ends: `python -m flashtensors.worker.warm_process`, an order on standard input.

It says on standard output what it did, and fills the folder of binaries that the worker reads. It has the lowest
priority, and memory of its own on the device as long as it runs.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

MAX_THREADS = 8
"""Steps that are rehearsed at a time."""

_log = logging.getLogger(__name__)


class WarmOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to compile."""

    root: str
    """Where binaries are kept."""
    device: str
    """`cuda:N`."""
    kinds: list[msgspec.Raw]
    """Each a `runner.rehearsal.StepKinds`."""


def main() -> int:
    """Obey the order; returns the exit status: 1 where something of it failed."""
    os.nice(19)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s kernels %(levelname)s %(message)s")
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=WarmOrder)
    has_failed = [not _warm(order, kinds) for kinds in order.kinds]
    return int(any(has_failed))


def _warm(order: WarmOrder, encoded: msgspec.Raw) -> bool:
    """Compile for one model; whether that worked."""
    import torch  # seconds, and only here, where the priority is low

    from ..kernels.binaries import keep_binaries_in, note_warmed, warm
    from ..runner.rehearsal import StepKinds, rehearsal_calls

    device = torch.device(order.device)
    torch.cuda.set_device(device)
    folder = keep_binaries_in(Path(order.root), torch.cuda.get_device_capability(device))
    kinds = msgspec.json.decode(encoded, type=StepKinds)
    try:
        report = warm(rehearsal_calls(kinds, device), folder, num_threads=min(MAX_THREADS, os.cpu_count() or 1))
    except Exception as error:
        _log.warning("kernels of a %s were not compiled ahead: %s", kinds.config.model_type, error)
        return False
    note_warmed(folder, bytes(encoded))
    torch.cuda.empty_cache()
    print(f"compiled {report.num_compiled} kernels of a {kinds.config.model_type} in {report.elapsed_s:.1f} s")
    return True


if __name__ == "__main__":
    sys.exit(main())
