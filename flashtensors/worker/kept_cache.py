"""The KV cache of a model that left its dock."""

from __future__ import annotations

from ..engine.loop import Engine
from ..memory.weight_arena import WeightArena
from .moored_runner import MooredRunner


class KeptCache:
    """An engine, with what it knows of prefixes, and the memory of its KV cache; implements `loading.KeptKv`.

    Args:
        engine: Without work.
        runner: The engine's.
        kv: The range that the cache lies in; it is taken away from there.
    """

    def __init__(self, engine: Engine, runner: MooredRunner, kv: WeightArena) -> None:
        self.engine = engine
        self.runner = runner
        self.num_bytes = kv.mapped_bytes
        """Device memory that it holds."""
        self._pool = kv.pool
        self._handles = kv.detach()
        runner.unmoor()

    def attach(self, kv: WeightArena) -> None:
        """Put the cache into a range of the same layout, whose it is from now on."""
        kv.attach(self._handles)
        self._handles = []

    def close(self) -> None:
        """Give the memory back, unless it was attached."""
        handles, self._handles = self._handles, []
        self._pool.give_back(handles)
