"""Tells those who compute when a layer's weights have landed, while later layers are still on their way."""

from __future__ import annotations

import threading
import time

import torch

from ..errors import FlashError, TransferError


class LayerEvents:
    """One CUDA event for each stage of a load, recorded behind the stage's last copy.

    Made by the caller of a load before it starts, in whichever thread; `load` fills it in.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last_stages: dict[int | None, int] | None = None
        self._events: list[torch.cuda.Event | None] = []
        self._error: FlashError | None = None
        self.queued_s = 0.0
        """When copies were queued last, by `time.perf_counter`."""

    def wait(self, layer: int | None, stream: torch.cuda.Stream | None = None, timeout_s: float | None = None) -> bool:
        """Let `stream` run on only once decoder layer `layer`, and all that comes before it, is in the arena.

        Waits itself until the copies are queued; without a stream, until they have ended.

        Args:
            layer: None: every weight.
            stream: See above.
            timeout_s: Seconds to wait for the copies to be queued; None: any time.

        Returns:
            False where the time was too short.

        Raises:
            TransferError: The load failed.
        """
        with self._changed:
            is_over = self._changed.wait_for(lambda: self._has(layer) or self._error is not None, timeout_s)
            if self._error is not None:
                what = "the model" if layer is None else f"layer {layer}"
                raise TransferError(f"{what} was not loaded: {self._error.message}") from self._error
            if not is_over:
                return False
            event = self._events[self._stage(layer)] if self._events else None
        if event is not None:
            event.wait(stream) if stream is not None else event.synchronize()
        return True

    # What the load calls.

    def begin(self, last_stages: dict[int | None, int]) -> None:
        """Say which stages there will be: by decoder layer, the last stage that belongs to it."""
        with self._changed:
            self._last_stages = last_stages

    def landed(self, num_stages: int, event: torch.cuda.Event | None) -> None:
        """All copies of the first `num_stages` stages are queued; `event` comes behind them (None: they have ended)."""
        with self._changed:
            self.queued_s = time.perf_counter()
            self._events += [event] * (num_stages - len(self._events))
            self._changed.notify_all()

    def fail(self, error: FlashError) -> None:
        """Wake all who wait, with the error that ended the load; whoever comes later gets it too."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _stage(self, layer: int | None) -> int:
        assert self._last_stages is not None
        if layer is None:
            return max(self._last_stages.values(), default=-1)
        return self._last_stages[layer]

    def _has(self, layer: int | None) -> bool:
        return self._last_stages is not None and len(self._events) > self._stage(layer)
