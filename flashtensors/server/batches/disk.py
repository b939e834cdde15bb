"""Writes that are not to be interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


async def write_whole(write: Callable[_Args, _Result], *args: _Args.args, **options: _Args.kwargs) -> _Result:
    """Run a blocking write in a thread; a cancelled caller waits until it has ended.

    A thread cannot be stopped: a write that nobody waits for would go on beside the next one to the same file.
    """
    writing = asyncio.create_task(asyncio.to_thread(write, *args, **options))
    try:
        return await asyncio.shield(writing)
    finally:
        if not writing.done():
            await asyncio.wait({writing})
