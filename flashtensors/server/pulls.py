"""Pulls on behalf of HTTP clients: blocking work in threads, progress as Ollama's objects.

Two clients that ask for one reference follow one pull; across processes the catalog's lock does the same. A pull whose
last follower has left is stopped; what it downloaded stays for the next attempt.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import msgspec

from ..checkpoint.catalog import Catalog, ModelRecord
from ..checkpoint.names import is_path
from ..checkpoint.progress import PullProgress
from ..config import Settings
from ..errors import InvalidName, PullError

MAX_PULLS = 4
"""Pulls at once; more wait their turn."""
REPORT_EVERY_S = 0.06
"""Least time between two reports to one follower."""


class PullCall(msgspec.Struct, frozen=True, kw_only=True):
    """What to pull; equal calls share one pull."""

    reference: str
    revision: str | None = None
    token: str | None = None
    force: bool = False
    name: str | None = None
    """What the model is to be called; None: as its reference says."""
    quantization: str | None = None


def progress_body(progress: PullProgress) -> dict[str, object]:
    """A report in Ollama's shape."""
    subject = f" {progress.file}" if progress.file is not None else ""
    body: dict[str, object] = {"status": f"{progress.status}{subject}"}
    if progress.total_bytes is not None:
        body |= {"total": progress.total_bytes, "completed": progress.done_bytes}
    return body


def success_body(record: ModelRecord) -> dict[str, object]:
    """The last object of a pull; `model` is an extension: the name it is listed under."""
    return {"status": "success", "model": record.name}


class _Pull:
    """One pull that runs in a thread, and those who follow it on the event loop."""

    def __init__(self, call: PullCall) -> None:
        self.call = call
        self.num_followers = 0
        self.latest: PullProgress | None = None
        self.is_abandoned = threading.Event()
        self.future: asyncio.Future[ModelRecord] | None = None
        self._loop = asyncio.get_running_loop()

    def report(self, progress: PullProgress) -> None:
        """Called in the pulling thread."""
        if self.is_abandoned.is_set():
            raise PullError(f"the pull of {self.call.reference} was stopped: nobody waits for it any more")
        self._loop.call_soon_threadsafe(setattr, self, "latest", progress)


class Pulls:
    """The pulls of one daemon; an async context manager that stops them on exit."""

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self._catalog, self._settings = catalog, settings
        self._executor = ThreadPoolExecutor(MAX_PULLS, thread_name_prefix="pull")
        self._running: dict[PullCall, _Pull] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for one in self._running.values():
            one.is_abandoned.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def check(self, call: PullCall) -> None:
        """Refuse paths from clients of other machines: they would name files of this one."""
        if is_path(call.reference) and not self._settings.is_loopback:
            raise InvalidName(
                f"{call.reference[:200]!r} is a path; a daemon that other machines reach pulls from package indexes "
                "and the hub only",
                param="model",
            )

    async def follow(self, call: PullCall) -> AsyncGenerator[dict[str, object]]:
        """Pull, or join the pull that runs; yields reports and at last `success`."""
        one = self._running.get(call) or self._start(call)
        assert one.future is not None, "set by _start"
        one.num_followers += 1
        seen: PullProgress | None = None
        try:
            while not one.future.done():
                await asyncio.wait({one.future}, timeout=REPORT_EVERY_S)
                if one.latest is not None and one.latest is not seen:
                    seen = one.latest
                    yield progress_body(seen)
            yield success_body(one.future.result())
        finally:
            one.num_followers -= 1
            if one.num_followers == 0 and not one.future.done():
                one.is_abandoned.set()
                self._running.pop(call, None)

    def _start(self, call: PullCall) -> _Pull:
        one = _Pull(call)
        self._running[call] = one
        one.future = asyncio.get_running_loop().run_in_executor(self._executor, self._pull, one)

        def forget(done: asyncio.Future[ModelRecord]) -> None:
            if self._running.get(call) is one:
                del self._running[call]
            if not done.cancelled():
                done.exception()  # read even when all followers have left

        one.future.add_done_callback(forget)
        return one

    def _pull(self, one: _Pull) -> ModelRecord:
        # Imported here: the clients of the hub and of GGUF are most of what a daemon would import.
        from ..checkpoint.pull import pull

        call = one.call
        return pull(
            self._catalog,
            call.reference,
            name=call.name,
            revision=call.revision,
            token=call.token or self._settings.hf_token,
            force=call.force,
            quantization=call.quantization,
            progress=one.report,
        )
