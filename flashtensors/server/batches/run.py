"""One batch's requests at the model: a bounded window of them in flight, each tried until it has a result."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, cast

import msgspec

from ...errors import CapacityError, FlashError, WorkerError
from .disk import write_whole
from .input import BatchInput, BatchLine
from .results import Result, ResultLog, answered, never_run, refused
from .window import Window

LineRunner = Callable[[str, bytes, str], Awaitable[object | None]]
"""Answers one request: endpoint, body and request id in, the body of the answer out; raises `FlashError`. None: there
is no room for the request now, which says nothing of the request."""

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
MAX_TRIES = 8
"""Tries of a request whose worker dies, or whose model finds no memory; about a minute in all."""
MAX_WAIT_FOR_ROOM_S = 5.0
"""Longest pause of a request that there was no room for. It is sent again until the batch ends."""
LOOK_AGAIN_S = 0.25
"""Between two looks at the window while nothing ends."""
NUM_REFUSED_AT_ONCE = 1000
"""Results that are written together when a batch ends early."""

_WHY = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was run"),
    "expired": ("batch_expired", "the batch's completion window ended before this request was run"),
}


class BatchRun:
    """Runs the requests of one batch that have no result yet.

    Args:
        endpoint: Their route.
        lines: The requests.
        log: Where results go.
        run_line: Answers a request.
        window: Says how many answers may be in flight; new for this run.
        on_progress: Called after results were written.
    """

    def __init__(
        self,
        endpoint: str,
        lines: BatchInput,
        log: ResultLog,
        run_line: LineRunner,
        *,
        window: Window,
        on_progress: Callable[[], None],
    ) -> None:
        self._endpoint, self._lines, self._log, self._run_line = endpoint, lines, log, run_line
        self._window, self._on_progress = window, on_progress
        self._finished: asyncio.Queue[tuple[asyncio.Task[Result], _Demand]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Result]] = set()

    async def run(self) -> None:
        """Run all; cancellation stops what is in flight, and leaves it without a result.

        Raises:
            StoreError: A result could not be written.
        """
        try:
            for line in self._pending():
                demand = _find_demand(line)
                while not self._window.has_room(demand.model, demand.num_answers):
                    await self._collect(LOOK_AGAIN_S)
                self._start(line, demand)
            while self._tasks:
                await self._collect()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def refuse_rest(self, reason: str) -> None:
        """Give every request without a result one that says why it was not run: `cancelled` or `expired`."""
        code, message = _WHY[reason]
        ended = [task for task in self._tasks if not task.cancelled() and task.exception() is None]
        await self._write([task.result() for task in ended])  # while a write went on, or in the moment of the end
        results: list[Result] = []
        for line in self._pending():
            results.append(never_run(line.custom_id, code, message))
            if len(results) == NUM_REFUSED_AT_ONCE:
                await self._write(results)
                results = []
        await self._write(results)

    def _pending(self) -> Iterator[BatchLine]:
        return (line for line in self._lines.lines() if not self._log.has(line.custom_id))

    def _start(self, line: BatchLine, demand: _Demand) -> None:
        task = asyncio.create_task(self._result(line))
        self._tasks.add(task)
        self._window.take(demand.model, demand.num_answers)
        task.add_done_callback(lambda done: self._finished.put_nowait((done, demand)))

    async def _collect(self, timeout_s: float | None = None) -> None:
        """Wait for a result, at most for so long, and write all that are there."""
        finished: list[tuple[asyncio.Task[Result], _Demand]] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                finished.append(await self._finished.get())
        while not self._finished.empty():
            finished.append(self._finished.get_nowait())
        for task, demand in finished:
            self._tasks.discard(task)
            self._window.give_back(demand.model, demand.num_answers)
        if finished:
            await self._write([task.result() for task, _ in finished])

    async def _write(self, results: list[Result]) -> None:
        await write_whole(self._log.append, results)
        self._on_progress()

    async def _result(self, line: BatchLine) -> Result:
        """Send a request until there is something to say of it: that there was no room is nothing."""
        request_id = f"req_{uuid.uuid4().hex}"
        delay_s, num_failures = FIRST_DELAY_S, 0
        while True:
            try:
                answer = await self._run_line(self._endpoint, bytes(line.body), request_id)
            except FlashError as error:
                num_failures += 1
                if not isinstance(error, (CapacityError, WorkerError)) or num_failures == MAX_TRIES:
                    return refused(line.custom_id, request_id, error)
                longest_s = MAX_DELAY_S
            else:
                if answer is not None:
                    return answered(line.custom_id, request_id, answer)
                longest_s = MAX_WAIT_FOR_ROOM_S
            delay_s = min(longest_s, delay_s)
            await asyncio.sleep(delay_s)
            delay_s *= 2


class _Demand(msgspec.Struct, frozen=True):
    """What a request asks for, as far as it says so in order; what else it says is its own error."""

    model: str
    n: Any = 1
    prompt: Any = None

    @property
    def num_answers(self) -> int:
        """To all its prompts: a list holds several, unless it is token ids."""
        prompts = self.prompt if isinstance(self.prompt, list) else []
        num_prompts = sum(not isinstance(prompt, int) for prompt in cast("list[object]", prompts))
        return max(1, num_prompts) * (self.n if isinstance(self.n, int) and self.n > 0 else 1)


def _find_demand(line: BatchLine) -> _Demand:
    try:
        return msgspec.json.decode(line.body, type=_Demand)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Demand(model="")
