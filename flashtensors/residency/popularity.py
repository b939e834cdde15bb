"""How often a model is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY_S = 600.0
"""An arrival this long ago counts 1/e."""


@dataclass(slots=True)
class Popularity:
    """Arrivals per second, exponentially decayed: each counts `exp(-age / MEMORY_S) / MEMORY_S`."""

    _weight: float = 0.0
    _weighed_at_s: float = 0.0

    def count(self, now_s: float) -> None:
        """One more request, or one more caller who wants the model loaded."""
        self._weight = self._decayed(now_s) + 1.0
        self._weighed_at_s = now_s

    def rate_per_s(self, now_s: float) -> float:
        """Arrivals per second to expect."""
        return self._decayed(now_s) / MEMORY_S

    def is_wanted(self, now_s: float) -> bool:
        """Whether there was about one arrival in the last `MEMORY_S`."""
        return self._decayed(now_s) > math.exp(-1.0)

    def _decayed(self, now_s: float) -> float:
        return self._weight * math.exp(-max(0.0, now_s - self._weighed_at_s) / MEMORY_S)
