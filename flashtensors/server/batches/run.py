"""One batch's requests at the model: a bounded window of them in flight, each tried until it has a result."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from ...errors import CapacityError, FlashError, WorkerError
from .input import BatchInput, BatchLine
from .results import Result, ResultLog, answered, never_run, refused

LineRunner = Callable[[str, bytes, str], Awaitable[object]]
"""Answers one request: endpoint, body and request id in, the body of the answer out; raises `FlashError`."""

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
MAX_TRIES = 8
"""Tries of a request that meets a full queue or a dying worker; about a minute in all."""
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
        window: Answers that may be in flight; a request that asks for more than that runs alone.
        on_progress: Called after results were written.
    """

    def __init__(
        self,
        endpoint: str,
        lines: BatchInput,
        log: ResultLog,
        run_line: LineRunner,
        *,
        window: int,
        on_progress: Callable[[], None],
    ) -> None:
        self._endpoint, self._lines, self._log, self._run_line = endpoint, lines, log, run_line
        self._window, self._on_progress = window, on_progress
        self._finished: asyncio.Queue[tuple[asyncio.Task[Result], int]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Result]] = set()
        self._num_in_flight = 0

    async def run(self) -> None:
        """Run all; cancellation stops what is in flight, and leaves it without a result.

        Raises:
            StoreError: A result could not be written.
        """
        try:
            for line in self._pending():
                num_answers = _num_answers(line)
                while self._tasks and self._num_in_flight + num_answers > self._window:
                    await self._collect()
                self._start(line, num_answers)
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
        results: list[Result] = []
        for line in self._pending():
            results.append(never_run(line.custom_id, code, message))
            if len(results) == NUM_REFUSED_AT_ONCE:
                await self._write(results)
                results = []
        await self._write(results)

    def _pending(self) -> Iterator[BatchLine]:
        return (line for line in self._lines.lines() if not self._log.has(line.custom_id))

    def _start(self, line: BatchLine, num_answers: int) -> None:
        task = asyncio.create_task(self._result(line))
        self._tasks.add(task)
        self._num_in_flight += num_answers
        task.add_done_callback(lambda done: self._finished.put_nowait((done, num_answers)))

    async def _collect(self) -> None:
        """Wait for a result and write all that are there."""
        finished = [await self._finished.get()]
        while not self._finished.empty():
            finished.append(self._finished.get_nowait())
        for task, num_answers in finished:
            self._tasks.discard(task)
            self._num_in_flight -= num_answers
        await self._write([task.result() for task, _ in finished])

    async def _write(self, results: list[Result]) -> None:
        # Not to be interrupted: a write that goes on in its thread while the log is closed would be lost half-way.
        writing = asyncio.create_task(asyncio.to_thread(self._log.append, results))
        try:
            await asyncio.shield(writing)
        finally:
            if not writing.done():
                await asyncio.wait({writing})
        self._on_progress()

    async def _result(self, line: BatchLine) -> Result:
        request_id = f"req_{uuid.uuid4().hex}"
        delay_s = FIRST_DELAY_S
        for _ in range(MAX_TRIES - 1):
            with contextlib.suppress(CapacityError, WorkerError):
                return await self._try(line, request_id)
            await asyncio.sleep(delay_s)
            delay_s = min(MAX_DELAY_S, 2 * delay_s)
        try:
            return await self._try(line, request_id)
        except FlashError as error:
            return refused(line.custom_id, request_id, error)

    async def _try(self, line: BatchLine, request_id: str) -> Result:
        try:
            answer = await self._run_line(self._endpoint, bytes(line.body), request_id)
        except (CapacityError, WorkerError):
            raise
        except FlashError as error:
            return refused(line.custom_id, request_id, error)
        return answered(line.custom_id, request_id, answer)


class _AnswersField(msgspec.Struct, frozen=True):
    n: int = 1


def _num_answers(line: BatchLine) -> int:
    """Answers that a request asks for, as far as it says so in order; what else it says is its own error."""
    try:
        return max(1, msgspec.json.decode(line.body, type=_AnswersField).n)
    except msgspec.DecodeError:
        return 1
