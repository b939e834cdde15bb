"""One batch's requests at the model: a bounded window of them in flight, each tried until it has a result.

Requests that were in flight when a worker died are suspects: one of them may be why. They are sent again one at a time,
before any other, so that the one that kills workers is found and fails alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from ...errors import CapacityError, FlashError, StoreError, WorkerError
from ..responses import internal_error
from .disk import run_whole
from .input import BatchInput, BatchLine
from .results import Result, ResultLog, answered, never_run, refused
from .window import Window

LineRunner = Callable[[str, bytes, str], Awaitable[object | None]]
"""Answers one request: endpoint, body and request id in, the body of the answer out; raises `FlashError`. None: there
is no room for the request now, which says nothing of the request."""

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
MAX_TRIES = 8
"""Tries of a request whose model finds no memory, or its files no disk; about a minute in all."""
MAX_DEATHS_ALONE = 2
"""Workers that may die while a request is the only one of its batch in flight; then it fails."""
MAX_BODY_BYTES_IN_FLIGHT = 64 * 1024**2
"""Of all requests in flight; a larger one is sent alone."""
MAX_WAIT_FOR_ROOM_S = 5.0
"""Longest pause of a request that there was no room for. It is sent again until the batch ends."""
LOOK_AGAIN_S = 0.25
"""Between two looks at the window while nothing ends."""

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
        self._finished: asyncio.Queue[tuple[asyncio.Task[Result | None], _Request]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Result | None]] = set()
        self._num_body_bytes = 0
        self._suspects: deque[_Request] = deque()

    async def run(self) -> None:
        """Run all; cancellation stops what is in flight, and leaves it without a result.

        Raises:
            StoreError: A line could not be read, or a result not be written.
        """
        try:
            with contextlib.closing(self._lines.pieces(self._log.has)) as pieces:
                while piece := await run_whole(next, pieces, None):
                    for line in piece:
                        await self._send(_Request(line, _find_demand(line)))
            await self._collect_all()
            await self._clear_suspects()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def refuse_rest(self, reason: str) -> None:
        """Give every request without a result one that says why it was not run: `cancelled` or `expired`."""
        code, message = _WHY[reason]
        ended = [task for task in self._tasks if not task.cancelled() and task.exception() is None]
        results = [result for task in ended if (result := task.result()) is not None]
        await self._write(results)  # those that came while a write went on, or in the moment of the end
        with contextlib.closing(self._lines.pieces(self._log.has)) as pieces:
            while piece := await run_whole(next, pieces, None):
                await self._write([never_run(line.custom_id, code, message) for line in piece])

    async def _send(self, request: _Request) -> None:
        while not self._has_room(request):
            await self._collect(LOOK_AGAIN_S)
        await self._clear_suspects()
        self._start(request)

    def _has_room(self, request: _Request) -> bool:
        num_bytes = self._num_body_bytes + len(request.line.body)
        if self._tasks and num_bytes > MAX_BODY_BYTES_IN_FLIGHT:
            return False
        return self._window.has_room(request.demand.model, request.demand.num_answers)

    async def _clear_suspects(self) -> None:
        """Give each suspect a result before anything else is sent."""
        while self._suspects:
            await self._collect_all()
            self._start(self._suspects.popleft(), is_alone=True)
            await self._collect_all()

    def _start(self, request: _Request, *, is_alone: bool = False) -> None:
        task = asyncio.create_task(self._result(request.line, is_alone=is_alone))
        self._tasks.add(task)
        self._num_body_bytes += len(request.line.body)
        self._window.take(request.demand.model, request.demand.num_answers)
        task.add_done_callback(lambda done: self._finished.put_nowait((done, request)))

    async def _collect_all(self) -> None:
        while self._tasks:
            await self._collect()

    async def _collect(self, timeout_s: float | None = None) -> None:
        """Wait for a result, at most for so long, and write all that are there."""
        finished: list[tuple[asyncio.Task[Result | None], _Request]] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                finished.append(await self._finished.get())
        while not self._finished.empty():
            finished.append(self._finished.get_nowait())
        results: list[Result] = []
        for task, request in finished:
            self._tasks.discard(task)
            self._num_body_bytes -= len(request.line.body)
            self._window.give_back(request.demand.model, request.demand.num_answers)
            result = task.result()
            if result is None:
                self._suspects.append(request)
            else:
                results.append(result)
        if results:
            await self._write(results)

    async def _write(self, results: list[Result]) -> None:
        await run_whole(self._log.append, results)
        self._on_progress()

    async def _result(self, line: BatchLine, *, is_alone: bool) -> Result | None:
        """Send a request until there is something to say of it: that there was no room is nothing.

        None: its worker died, and as it was not alone, it may not be why.
        """
        request_id = f"req_{uuid.uuid4().hex}"
        delay_s, num_failures, num_deaths = FIRST_DELAY_S, 0, 0
        while True:
            longest_s = MAX_DELAY_S
            try:
                answer = await self._run_line(self._endpoint, bytes(line.body), request_id)
                if answer is not None:
                    return answered(line.custom_id, request_id, answer)
                longest_s = MAX_WAIT_FOR_ROOM_S
            except WorkerError as error:
                if not is_alone:
                    return None
                num_deaths += 1
                if num_deaths == MAX_DEATHS_ALONE:
                    return refused(line.custom_id, request_id, error)
            except FlashError as error:
                num_failures += 1
                if not _may_pass(error) or num_failures == MAX_TRIES:
                    return refused(line.custom_id, request_id, error)
            except Exception as error:  # the boundary: a bug is the end of its line, not of the batch
                return refused(line.custom_id, request_id, internal_error(error))
            delay_s = min(longest_s, delay_s)
            await asyncio.sleep(delay_s)
            delay_s *= 2


def _may_pass(error: FlashError) -> bool:
    """Whether it says something of memory or disk now, rather than of the request."""
    return isinstance(error, CapacityError) or (isinstance(error, StoreError) and error.http_status >= 500)


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


@dataclass(frozen=True, slots=True)
class _Request:
    line: BatchLine
    demand: _Demand


def _find_demand(line: BatchLine) -> _Demand:
    try:
        return msgspec.json.decode(line.body, type=_Demand)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Demand(model="")
