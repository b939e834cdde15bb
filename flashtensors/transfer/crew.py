"""Threads that share one piece of work, and the thread that waits for what they bring."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from ..errors import CapacityError, TransferError

PROGRESS_INTERVAL_S = 0.1

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class ProgressTicker:
    """Calls a progress function a few times a second, and at the end.

    Args:
        progress: None: nobody wants to know.
        total_bytes: Bytes in all.
        find_done_bytes: Bytes done by now.
    """

    def __init__(self, progress: Progress | None, total_bytes: int, find_done_bytes: Callable[[], int]) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._find_done_bytes = find_done_bytes
        self._last_s = time.monotonic()

    def tick(self) -> None:
        """Report, unless that was done a moment ago."""
        now_s = time.monotonic()
        if self._progress is not None and now_s - self._last_s >= PROGRESS_INTERVAL_S:
            self._last_s = now_s
            self._progress(self._find_done_bytes(), self._total_bytes)

    def finish(self) -> None:
        """Report that all is done."""
        if self._progress is not None:
            self._progress(self._total_bytes, self._total_bytes)


class Crew:
    """Runs `work` in several threads while the block lasts; leaving it stops them and waits until they are gone.

    Args:
        num_threads: How many.
        work: Called once in each thread, with the crew; returns when nothing is left to do, and soon after
            `is_stopping`.
        cancel: Set it to stop them from outside.
        on_stop: Wakes threads that wait for something, so that they see that they should return.
    """

    def __init__(
        self,
        num_threads: int,
        work: Callable[[Crew], None],
        cancel: threading.Event,
        *,
        on_stop: Callable[[], None] | None = None,
    ) -> None:
        self._work = work
        self._on_stop = on_stop
        self._cancel = cancel
        self._changed = threading.Condition()
        self._is_left = False
        self._error: BaseException | None = None
        self._num_running = num_threads
        self._threads = [
            threading.Thread(target=self._run, name=f"load-{index}", daemon=True) for index in range(num_threads)
        ]

    @property
    def is_stopping(self) -> bool:
        """Whether the threads should return."""
        return self._is_left or self._error is not None or self._cancel.is_set()

    @property
    def is_done(self) -> bool:
        """Whether every thread has returned."""
        return self._num_running == 0

    def announce(self) -> None:
        """Wake the waiting thread, because something is there that was not before."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, is_there: Callable[[], bool], ticker: ProgressTicker) -> None:
        """Wait until something is there, reporting progress meanwhile.

        Raises:
            TransferError: The work was cancelled.
            BaseException: The first error of a thread.
        """
        while True:
            ticker.tick()
            is_over = is_there()  # asked first: a thread may fail as the last one to return
            if self._error is not None:
                raise self._error
            if is_over:
                return
            if self._cancel.is_set():
                raise TransferError("the load was cancelled")
            with self._changed:
                self._changed.wait_for(lambda: is_there() or self.is_stopping or self.is_done, PROGRESS_INTERVAL_S)

    def __enter__(self) -> Self:
        """Start the threads; raises `CapacityError` where the system gives no more of them."""
        num_started = 0
        try:
            for thread in self._threads:
                thread.start()
                num_started += 1
        except RuntimeError as error:
            del self._threads[num_started:]
            self.__exit__(None, None, None)
            raise CapacityError(f"the system gives no more than {num_started} threads to read with: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_left = True
        if self._on_stop is not None:
            self._on_stop()
        for thread in self._threads:
            thread.join()
        self._error = None  # it has been raised, and holds what it has passed through: this crew among it

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # handed to the thread that waits
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()
