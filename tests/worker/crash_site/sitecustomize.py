"""Kills a worker process at a stage of its work, once: Python imports this by itself when it starts.

The file that `CRASH_AT` names holds the stage. It is removed first, so the next worker lives.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die_at(stage: str) -> None:
    """End this process as the kernel's killer does, where it was told to at this stage."""
    path = Path(os.environ["CRASH_AT"])
    if path.exists() and path.read_text() == stage:
        path.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


class MortalPlan:
    """A planned model whose load has stages to die at."""

    def __init__(self, planned: Any) -> None:
        self._planned = planned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planned, name)

    def load(self, grant: Any, progress: Callable[..., None], *rest: Any) -> Any:
        def report(*so_far: Any) -> None:
            progress(*so_far)
            die_at("reading")

        die_at("admitted")
        loaded = self._planned.load(grant, report, *rest)
        die_at("loaded")
        return loaded


def install() -> None:
    """Put the stages into the worker's classes."""
    from flashtensors.engine.loop import Engine
    from flashtensors.worker.checkpoint_loader import CheckpointLoader

    plan, init, step = CheckpointLoader.plan, Engine.__init__, Engine.step
    num_steps = 0

    def mortal_plan(self: Any, *args: Any) -> Any:
        die_at("planning")
        planned = plan(self, *args)
        die_at("planned")
        return MortalPlan(planned)

    def mortal_init(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        die_at("building")

    def mortal_step(self: Any) -> Any:
        nonlocal num_steps
        num_steps += 1
        die_at("first step" if num_steps == 1 else f"step {num_steps}")
        return step(self)

    CheckpointLoader.plan = mortal_plan  # pyright: ignore
    Engine.__init__ = mortal_init
    Engine.step = mortal_step


if "flashtensors.worker.process" in sys.orig_argv and "CRASH_AT" in os.environ:
    install()
