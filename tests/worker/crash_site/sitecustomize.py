"""Kills a worker process at a stage of its work, once: Python imports this by itself when it starts.

The file that `CRASH_AT` names holds the stage. It is removed first, so the next worker lives. With `CRASH_DOCKED` the
worker has docks in host memory, and its host tier in the daemon's memory file, as it would have on a GPU.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BEFORE_STEPS = ("ready", "landed")
_lock = threading.RLock()


def is_to_die_at(*stages: str) -> bool:
    """Whether this process was told to end at one of these stages."""
    path = Path(os.environ["CRASH_AT"])
    with _lock:  # which a thread that dies never gives back
        return path.exists() and path.read_text() in stages


def die_at(stage: str) -> None:
    """End this process as the kernel's killer does, where it was told to at this stage."""
    with _lock:
        if is_to_die_at(stage):
            Path(os.environ["CRASH_AT"]).unlink()
            os.kill(os.getpid(), signal.SIGKILL)


class MortalPlan:
    """A planned model whose load has stages to die at."""

    def __init__(self, planned: Any) -> None:
        self._planned = planned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planned, name)

    def load(self, grant: Any, progress: Any, cancel: Any, on_ready: Callable[[Any], None]) -> Any:
        def be_ready(loaded: Any) -> None:
            die_at("prepared")
            on_ready(loaded)
            die_at("ready")

        die_at("admitted")
        stats = self._planned.load(grant, progress, cancel, be_ready)
        die_at("landed")
        return stats


class MortalHeader:
    """The header of a note in the memory file: before it is written, the note is there and counts for nothing."""

    def __init__(self, header: Any) -> None:
        self._header = header

    def __getattr__(self, name: str) -> Any:
        return getattr(self._header, name)

    def pack(self, *fields: Any) -> bytes:
        die_at("noting")
        return self._header.pack(*fields)


def dies_after(owner: type, name: str, stage: str) -> None:
    """Let the process die when a method has returned for the first time."""
    method = getattr(owner, name)

    def mortal(*args: Any, **options: Any) -> Any:
        result = method(*args, **options)
        die_at(stage)
        return result

    setattr(owner, name, mortal)


def dock_in_host_memory() -> None:
    """Give loaders a harbour over the inherited memory file."""
    from flashtensors.worker.checkpoint_loader import CheckpointLoader
    from tests.worker.harbours import make_harbour

    init = CheckpointLoader.__init__

    def docked_init(self: Any, *args: Any, host_pool_fd: int, **options: Any) -> None:
        init(self, *args, **options, harbour=make_harbour(fd=host_pool_fd))

    CheckpointLoader.__init__ = docked_init  # pyright: ignore


def install() -> None:
    """Put the stages into the worker's classes."""
    from flashtensors.engine.loop import Engine
    from flashtensors.transfer.copies import BlockCopier
    from flashtensors.transfer.readers.buffered import BufferedReader
    from flashtensors.transfer.readers.direct import DirectReader
    from flashtensors.worker import host_index
    from flashtensors.worker.checkpoint_loader import CheckpointLoader

    plan, step = CheckpointLoader.plan, Engine.step
    num_steps = 0

    def mortal_plan(self: Any, *args: Any) -> Any:
        die_at("planning")
        planned = plan(self, *args)
        die_at("planned")
        return MortalPlan(planned)

    def mortal_step(self: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        if is_to_die_at(*_BEFORE_STEPS):
            threading.Event().wait()  # until the thread that loads has come there
        die_at("first step" if num_steps == 1 else f"step {num_steps}")
        return step(self)

    CheckpointLoader.plan = mortal_plan  # pyright: ignore
    Engine.step = mortal_step
    dies_after(BufferedReader, "read_into", "reading")
    dies_after(DirectReader, "read_into", "reading")
    dies_after(BlockCopier, "copy", "copying")
    host_index._HEADER = MortalHeader(host_index._HEADER)
    if "CRASH_DOCKED" in os.environ:
        dock_in_host_memory()


if "flashtensors.worker.process" in sys.orig_argv and "CRASH_AT" in os.environ:
    install()
