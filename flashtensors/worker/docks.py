"""Places on the device where models dock: addresses, a model over them and its runner, which outlive every tenant.

All models of one signature have their weights at the same offsets and the same constants in their kernels' arguments,
so the next one takes the place of the last: other memory, or other bytes, behind the same addresses. Nothing is built,
compiled or captured for it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ..checkpoint.architecture import ModelConfig
from ..errors import FlashError
from ..memory.device_pool import DevicePool
from ..memory.weight_arena import WeightArena

if TYPE_CHECKING:
    from ..runner.device_runner import DeviceRunner

MAX_UNUSED_DOCKS = 8
"""Docks without a model that are kept: each has CUDA graphs, some slots and no weights."""


@dataclass(frozen=True)
class DockKey:
    """What models must have in common to take each other's place."""

    layout: str
    """Signature of the load plan."""
    config: ModelConfig
    """Without what is only read on the host."""
    dtype: str
    kv_cache_dtype: str
    max_model_len: int | None

    @classmethod
    def of(
        cls, layout: str, config: ModelConfig, dtype: str, kv_cache_dtype: str, max_model_len: int | None
    ) -> DockKey:
        """The key of a model: two that differ in token ids, file dtype or tensor names alone have the same.

        What is quantised shows in the layout.
        """
        plain = msgspec.structs.replace(
            config, bos_token_id=None, eos_token_ids=(), dtype="float32", weight_prefix="", quantization=None
        )
        return cls(layout, plain, dtype, kv_cache_dtype, max_model_len)


class Dock:
    """Two ranges of addresses, for weights and for a KV cache, and the runner over them once there is one.

    Args:
        key: Of the models that fit.
        pool: Gives memory.
        weight_bytes: Of one model.
        kv_range_bytes: Most that a KV cache may ever take.
    """

    def __init__(self, key: Hashable, pool: DevicePool, weight_bytes: int, kv_range_bytes: int) -> None:
        self.key = key
        self.pool = pool
        self.weights = WeightArena(pool, weight_bytes, signature=key)
        try:
            self.kv = WeightArena(pool, kv_range_bytes, signature=key)
        except FlashError:
            self.weights.close()
            raise
        self.runner: DeviceRunner | None = None
        """Made by the first model that docks."""

    def unmap(self) -> None:
        """Give back the memory; nothing runs on it or is copied to it any more."""
        self.weights.unmap()
        self.kv.unmap()

    def close(self) -> None:
        """Give back the runner, the memory and the addresses."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None
        self.weights.close()
        self.kv.close()


class Docks:
    """The docks of one device. Any number of threads may use it.

    Args:
        pool: Gives memory.
        max_unused: Docks without a model that are kept; the one that was used longest ago is closed first.
    """

    def __init__(self, pool: DevicePool, *, max_unused: int = MAX_UNUSED_DOCKS) -> None:
        self.pool = pool
        self._max_unused = max_unused
        self._unused: list[Dock] = []
        self._num_taken = 0
        self._lock = threading.Lock()

    @property
    def num_unused(self) -> int:
        """Docks that wait for a model."""
        return len(self._unused)

    def take(self, key: Hashable, weight_bytes: int) -> Dock:
        """A dock for one model of `key`, with no memory behind it: one that was used before, or a new one."""
        with self._lock:
            dock = self._pop_unused(key)
            self._num_taken += dock is not None
        if dock is None:
            dock = Dock(key, self.pool, weight_bytes, self.pool.num_handles * self.pool.handle_bytes)
            with self._lock:
                self._num_taken += 1
        return dock

    def give_back(self, dock: Dock, *, is_sound: bool = True) -> None:
        """Take a dock back, and its memory; nothing runs on it or is copied to it any more.

        Args:
            dock: Where a model was.
            is_sound: Whether its runner can serve another model; False after a step that failed.
        """
        dock.unmap()
        with self._lock:
            self._num_taken -= 1
            if is_sound and dock.runner is not None:
                self._unused.append(dock)
                closed = list(self._pop_oldest())
            else:
                closed = [dock]
        for each in closed:
            each.close()

    def close(self) -> None:
        """Close all docks; every model has left."""
        assert self._num_taken == 0, f"{self._num_taken} models are still docked"
        for dock in self._unused:
            dock.close()
        self._unused.clear()

    def _pop_unused(self, key: Hashable) -> Dock | None:
        """The dock of `key` that was used last."""
        for index in reversed(range(len(self._unused))):
            if self._unused[index].key == key:
                return self._unused.pop(index)
        return None

    def _pop_oldest(self) -> Iterator[Dock]:
        for _ in itertools.repeat(None, max(0, len(self._unused) - self._max_unused)):
            yield self._unused.pop(0)
