"""The way from other threads to a worker, and the loop that lets it work while there is something to do."""

from __future__ import annotations

import threading
import time

from .host import Worker
from .messages import Command


class Inbox:
    """Commands of any threads for a worker that lives on one of its own, in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._is_rung = False

    def put(self, command: Command) -> None:
        """Queue a command; never blocks."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def ring(self) -> None:
        """Wake the worker though no command came."""
        with self._changed:
            self._is_rung = True
            self._changed.notify()

    def serve(self, worker: Worker) -> None:
        """Obey and step until the worker is closed, on the worker's thread; blocks while there is nothing to do."""
        is_busy = False
        while not worker.is_closed:
            for command in self._take(None if is_busy else worker.next_deadline(), is_busy=is_busy):
                worker.handle(command)
            is_busy = not worker.is_closed and worker.step()

    def _take(self, deadline_s: float | None, *, is_busy: bool) -> list[Command]:
        """Commands so far; without work, waits for one, for a ring or for the deadline."""
        with self._changed:
            if not is_busy:
                timeout_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                self._changed.wait_for(lambda: self._commands or self._is_rung, timeout_s)
            self._is_rung = False
            commands, self._commands = self._commands, []
            return commands
