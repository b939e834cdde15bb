"""Tells those who compute when a layer's weights have landed, while later layers are still on their way."""

from __future__ import annotations

import threading

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

    def wait_layer(self, layer: int, stream: torch.cuda.Stream | None = None, timeout_s: float | None = None) -> None:
        """Let `stream` run on only once decoder layer `layer`, and all that comes before it, is in the arena.

        Waits itself until the copies are queued; without a stream, until they have ended.

        Raises:
            TransferError: The load failed, or the time was too short.
        """
        self._wait(layer, stream, timeout_s)

    def wait_all(self, stream: torch.cuda.Stream | None = None, timeout_s: float | None = None) -> None:
        """As `wait_layer`, for every weight."""
        self._wait(None, stream, timeout_s)

    # What the load calls.

    def begin(self, last_stages: dict[int | None, int]) -> None:
        """Say which stages there will be: by decoder layer, the last stage that belongs to it."""
        with self._changed:
            self._last_stages = last_stages

    def landed(self, num_stages: int, event: torch.cuda.Event | None) -> None:
        """All copies of the first `num_stages` stages are queued; `event` comes behind them (None: they have ended)."""
        with self._changed:
            self._events += [event] * (num_stages - len(self._events))
            self._changed.notify_all()

    def fail(self, error: FlashError) -> None:
        """Wake all who wait, with the error that ended the load; whoever comes later gets it too."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _wait(self, layer: int | None, stream: torch.cuda.Stream | None, timeout_s: float | None) -> None:
        with self._changed:
            is_over = self._changed.wait_for(lambda: self._has(layer) or self._error is not None, timeout_s)
            if self._error is not None or not self._has(layer):
                reason = f": {self._error.message}" if is_over and self._error is not None else " in time"
                what = "the model" if layer is None else f"layer {layer}"
                raise TransferError(f"{what} was not loaded{reason}") from self._error
            event = self._events[self._stage(layer)] if self._events else None
        if event is not None:
            event.wait(stream) if stream is not None else event.synchronize()

    def _stage(self, layer: int | None) -> int:
        assert self._last_stages is not None
        if layer is None:
            return max(self._last_stages.values(), default=-1)
        return self._last_stages[layer]

    def _has(self, layer: int | None) -> bool:
        return self._last_stages is not None and len(self._events) > self._stage(layer)
