"""Work on files that is not to be interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


async def run_whole(call: Callable[_Args, _Result], *args: _Args.args, **options: _Args.kwargs) -> _Result:
    """Run a blocking call on a file in a thread; a cancelled caller waits until it has ended.

    A thread cannot be stopped: a call that nobody waits for would go on beside the next one on the same file.
    """
    running = asyncio.create_task(asyncio.to_thread(call, *args, **options))
    try:
        return await asyncio.shield(running)
    finally:
        if not running.done():
            await asyncio.wait({running})
