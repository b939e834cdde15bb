"""Compiles the kernels of registered models before anybody asks for an answer.

In a process of its own, for three reasons: compiling holds Python's lock for most of its time, and the worker's steps
would stall; loading a binary while a CUDA graph is being captured breaks the capture; and a compiler that crashes takes
nothing with it. The worker finds the binaries on disk when it first needs them, which takes milliseconds.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ..errors import FlashError
from ..kernels.binaries import is_warmed
from ..runner.rehearsal import StepKinds
from .warm_process import WarmOrder

_log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "flashtensors.worker.warm_process")


class KernelWarmer:
    """Starts a process for the models that came since the last one ended, as long as there are any.

    Models whose steps launch the same kernels are one; what was compiled once, by any process, is not looked at again.

    Args:
        folder: Of `keep_binaries_in`.
        device: `cuda:N`.
        command: Obeys a `WarmOrder`.
    """

    def __init__(self, folder: Path, device: str, *, command: Sequence[str] = _COMMAND) -> None:
        self._folder = folder
        self._device = device
        self._command = command
        self._lock = threading.Lock()
        self._wanted: list[Callable[[], StepKinds]] = []
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tried: set[bytes] = set()
        self._is_closed = False

    def want(self, find_kinds: Callable[[], StepKinds]) -> None:
        """Have the kernels of a model compiled, some time; does not wait.

        Args:
            find_kinds: Called in another thread; a model for which it raises `FlashError` is passed over.
        """
        with self._lock:
            if self._is_closed:
                return
            self._wanted.append(find_kinds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="warm kernels", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Wait until everything that was wanted is compiled."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def close(self) -> None:
        """End what runs."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
        self.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                wanted, self._wanted = self._wanted, []
                if not wanted or self._is_closed:
                    self._thread = None
                    return
            orders = {encoded for find_kinds in wanted if (encoded := _encode(find_kinds)) is not None}
            fresh = [order for order in sorted(orders - self._tried) if not is_warmed(self._folder, order)]
            self._tried |= orders
            if fresh:
                self._compile(fresh)

    def _compile(self, orders: list[bytes]) -> None:
        raws = [msgspec.Raw(order) for order in orders]
        order = WarmOrder(root=str(self._folder.parent), device=self._device, kinds=raws)
        with self._lock:
            if self._is_closed:
                return
            try:
                process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            except OSError as error:
                _log.warning("kernels are compiled when they are first needed, as no process starts: %s", error)
                return
            self._process = process
        said, _ = process.communicate(msgspec.json.encode(order))
        with self._lock:
            self._process = None
        for line in said.decode(errors="replace").splitlines():
            _log.info("%s", line)


def _encode(find_kinds: Callable[[], StepKinds]) -> bytes | None:
    try:
        return msgspec.json.encode(find_kinds())
    except FlashError as error:  # whoever loads the model is told
        _log.debug("no kernels are compiled ahead: %s", error)
        return None
