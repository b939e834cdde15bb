"""All batches of a daemon: they are checked at once, run one after the other, and taken up again after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec

from ...checkpoint.durable import disk_errors
from ...errors import FlashError, ObjectNotFound, RequestError, StoreError
from ..files import FileStore, derived_file_id
from ..responses import internal_error
from .disk import run_whole
from .input import BatchInput, InputChecker
from .job import Job
from .records import BatchRecord, BatchStore, LineError
from .results import ResultLog
from .run import BatchRun, LineRunner
from .window import Window

COMPLETION_WINDOW_S = 24 * 3600
"""What `24h`, the only completion window, means."""
RETRY_DISK_S = 30.0
"""Pause before a batch goes on whose results could not be written."""

_log = logging.getLogger(__name__)


class BatchJobs:
    """Batches in the background, inside an `async with` block; leaving it stops them where they are.

    Args:
        store: Their records.
        files: Input files, and where results are published.
        run_line: Answers one request.
        check_model: Raises `FlashError` for a model that cannot be asked; called in a thread.
        make_window: Says how many answers may be in flight; batches run one after the other, each with its own.
        clock: Unix seconds.
    """

    def __init__(
        self,
        store: BatchStore,
        files: FileStore,
        run_line: LineRunner,
        *,
        check_model: Callable[[str], object],
        make_window: Callable[[], Window],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._files, self._run_line = store, files, run_line
        self._check_model, self._make_window, self._clock = check_model, make_window, clock
        self._jobs: dict[str, Job] = {}
        self._check_turn, self._turn = asyncio.Lock(), asyncio.Lock()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._store.open)
        unfinished = [record for record in reversed(self._store.list()) if not record.is_final]
        unfinished.sort(key=lambda record: record.in_progress_at is None)  # the one that ran goes on first
        for record in unfinished:
            self._hold_files(record)
        keep = {file_id for record in unfinished for file_id in _result_ids(record.id)}
        await asyncio.to_thread(self._files.open, keep)
        for record in unfinished:
            await asyncio.to_thread(self._show_results, record)
            self._start(record)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [job.task for job in self._jobs.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def create(
        self, input_file_id: str, endpoint: str, *, metadata: dict[str, str] | None, output_expires_after_s: int | None
    ) -> BatchRecord:
        """Begin a batch; raises `RequestError` for a file that is no input, `ObjectNotFound` for one that is not."""
        purpose = self._files.get(input_file_id).purpose
        if purpose != "batch":
            text = f"file {input_file_id} has the purpose {purpose!r}, but input must be uploaded with 'batch'"
            raise RequestError(text, param="input_file_id")
        now_s = self._clock()
        record = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            created_at=int(now_s),
            expires_at=int(now_s) + COMPLETION_WINDOW_S,
            metadata=metadata,
            output_expires_after_s=output_expires_after_s,
            created_ns=int(now_s * 1e9),
        )
        try:
            await run_whole(self._store.save, record)
        except asyncio.CancelledError:  # the client left: what is on disk is a batch all the same
            self._begin(record)
            raise
        self._begin(record)
        return record

    def get(self, batch_id: str) -> BatchRecord:
        """A batch as it is now; raises `ObjectNotFound`."""
        return self._store.get(batch_id)

    def list(self) -> list[BatchRecord]:
        """All batches, newest first."""
        return self._store.list()

    async def cancel(self, batch_id: str) -> BatchRecord:
        """Stop a batch; what it has answered stays. Raises `RequestError` when it has ended already."""
        record = self._store.get(batch_id)
        if record.is_final or record.outcome is not None:
            raise RequestError(f"batch {batch_id} is {record.outcome or record.status} and can no longer be cancelled")
        job = self._jobs[batch_id]
        job.should_stop.set()
        if record.cancelling_at is None:
            record = await job.update(status="cancelling", cancelling_at=int(self._clock()))
        return record

    def check_unused(self, file_id: str) -> None:
        """Raise `RequestError` while a batch still reads a file, or makes it."""
        for record in self._store.list():
            if not record.is_final and file_id in _file_ids(record):
                raise RequestError(f"file {file_id} belongs to batch {record.id}; cancel that, or wait until it ends")

    def _show_results(self, record: BatchRecord) -> None:
        """Count what a batch that was interrupted has answered, before anybody asks."""
        paths = self._result_paths(record)
        if record.outcome is None and any(path.exists() for path in paths):
            with contextlib.suppress(StoreError), ResultLog(*paths) as log:  # its job will say what the disk says
                self._store.show(msgspec.structs.replace(record, **log.counts()))

    def _hold_files(self, record: BatchRecord) -> None:
        for file_id in _file_ids(record):
            self._files.hold(file_id)

    def _begin(self, record: BatchRecord) -> None:
        self._hold_files(record)
        self._store.show(record)
        self._start(record)

    def _start(self, record: BatchRecord) -> None:
        job = self._jobs[record.id] = Job(record.id, self._store)
        job.task = asyncio.create_task(self._follow(job), name=record.id)
        job.task.add_done_callback(lambda _: self._forget(record))

    def _forget(self, record: BatchRecord) -> None:
        for file_id in _file_ids(record):
            self._files.let_go(file_id)
        del self._jobs[record.id]

    async def _follow(self, job: Job) -> None:
        """Bring a batch to its end, whatever the disk says in between."""
        expiry = asyncio.get_running_loop().call_later(
            max(0.0, job.record.expires_at - self._clock()), job.should_stop.set
        )
        if job.record.cancelling_at is not None:
            job.should_stop.set()
        errors: list[LineError] = []
        try:
            while not job.record.is_final:
                try:
                    await self._advance(job, errors)
                except StoreError as error:
                    _log.error("%s waits %.0f s: %s", job.record.id, RETRY_DISK_S, error.message)
                    await asyncio.sleep(RETRY_DISK_S)
                except Exception as error:  # the boundary: a bug must not leave its batch without an end
                    errors = [_line_error(internal_error(error))]
                    _log.error("%s fails in %.0f s", job.record.id, RETRY_DISK_S)
                    await asyncio.sleep(RETRY_DISK_S)
        finally:
            expiry.cancel()

    async def _advance(self, job: Job, errors: list[LineError]) -> None:
        """Do what is left of a batch, or, where `errors` say why it cannot go on, end it with what it has."""
        if job.record.outcome is None:
            found = errors or await self._check(job)
            if isinstance(found, BatchInput):
                await self._compute(job, found)
            else:
                await self._fail(job, found)
        await self._publish(job)

    async def _check(self, job: Job) -> BatchInput | list[LineError]:
        """Read the input, or say why it cannot be run; one at a time, in the order in which they will run."""
        record = job.record
        # Once it has begun, a model that was removed since is an error of the requests that ask it.
        check_model = self._check_model if record.status == "validating" else self._look_at_model
        checker = InputChecker(record.endpoint, check_model)
        async with self._check_turn:
            try:
                lines = await asyncio.to_thread(checker.check, self._files.path(record.input_file_id))
            except StoreError as error:
                if isinstance(error, ObjectNotFound) or job.should_stop.is_set():  # later will not do
                    return [_line_error(error)]
                raise
            if lines is None:
                return checker.errors
            await job.update(num_total=lines.num_lines, model=lines.only_model)
            return lines

    def _look_at_model(self, model: str) -> None:
        with contextlib.suppress(FlashError):
            self._check_model(model)

    async def _compute(self, job: Job, lines: BatchInput) -> None:
        """Give every line a result, after the batches before; a batch that waits for its turn has no file open."""
        has_turn = await job.finishes(self._turn.acquire())
        try:
            if has_turn and job.record.status == "validating":
                await job.update(status="in_progress", in_progress_at=int(self._clock()))
            with await asyncio.to_thread(ResultLog, *self._result_paths(job.record)) as log:
                run = BatchRun(
                    job.record.endpoint,
                    lines,
                    log,
                    self._run_line,
                    window=self._make_window(),
                    on_progress=lambda: job.show(**log.counts()),
                )
                outcome = "completed"
                if not has_turn or not await job.finishes(run.run()):
                    outcome = "expired" if job.record.cancelling_at is None else "cancelled"
                    await run.refuse_rest(outcome)
                await asyncio.to_thread(log.sync)
                status = "cancelling" if outcome == "cancelled" else "finalizing"
                now_s = int(self._clock())
                await job.commit(outcome=outcome, status=status, finalizing_at=now_s, **log.counts())
        finally:
            if has_turn:
                self._turn.release()

    async def _fail(self, job: Job, errors: list[LineError]) -> None:
        """Let a batch end with the results that it has."""
        with await asyncio.to_thread(ResultLog, *self._result_paths(job.record)) as log:
            await asyncio.to_thread(log.sync)
            await job.commit(outcome="failed", errors=errors, **log.counts())

    async def _publish(self, job: Job) -> None:
        """Make files of the results; done again from the start after a crash."""
        record = job.record
        assert record.outcome is not None, "published once no more results will come"
        changes: dict[str, Any] = {"status": record.outcome, f"{record.outcome}_at": int(self._clock())}
        nums_lines = (record.num_completed, record.num_failed)
        found = zip(("output", "error"), _result_ids(record.id), nums_lines, self._result_paths(record), strict=True)
        for kind, file_id, num_lines, path in found:
            if num_lines:
                await asyncio.to_thread(
                    self._files.publish,
                    path,
                    filename=f"{record.id}_{kind}.jsonl",
                    purpose="batch_output",
                    expires_after_s=record.output_expires_after_s,
                    file_id=file_id,
                )
                changes[f"{kind}_file_id"] = file_id
            else:
                with disk_errors(path):
                    path.unlink(missing_ok=True)
        await job.commit(**changes)

    def _result_paths(self, record: BatchRecord) -> tuple[Path, Path]:
        return self._store.output_path(record.id), self._store.error_path(record.id)


def _line_error(error: FlashError) -> LineError:
    return LineError(code=error.code, message=error.message)


def _result_ids(batch_id: str) -> tuple[str, str]:
    return derived_file_id(f"{batch_id} output"), derived_file_id(f"{batch_id} errors")


def _file_ids(record: BatchRecord) -> tuple[str, ...]:
    """Files that must stay until a batch ends: its input, and results that are published already."""
    return record.input_file_id, *_result_ids(record.id)
