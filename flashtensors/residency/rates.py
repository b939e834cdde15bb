"""How fast bytes come back from the tiers below, as seen so far."""

from __future__ import annotations

from dataclasses import dataclass

LINK_BYTES_PER_S = 25e9
"""Host memory to device before anything was measured: PCIe gen4 x16."""
DISK_BYTES_PER_S = 2e9
"""Disk to host memory before anything was measured."""
LEAST_OBSERVED_BYTES = 64 * 1024**2
"""Transfers smaller than this are ruled by latency and say nothing of a rate."""
_NEWS_SHARE = 0.3
"""How much one more observation moves a rate."""


@dataclass
class Rates:
    """Bytes per second of the link to the device and of the disk; every observed load moves them.

    None: no load was observed yet; what loads will cost then goes by a guess, which is no measurement to show.
    """

    link_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None

    def seconds_to_load(self, num_bytes: int, host_bytes: int) -> float:
        """Seconds until a model of `num_bytes` is on the device when `host_bytes` of it are in host memory.

        Disk and link work at the same time, so the slower one counts.
        """
        return max(self._disk_seconds(max(0, num_bytes - host_bytes)), self._link_seconds(num_bytes))

    def observe(self, *, disk_bytes: int, num_bytes: int, seconds: float) -> None:
        """Learn from a load of `num_bytes`, of which `disk_bytes` were read from disk."""
        if seconds <= 0 or (disk_bytes or num_bytes) < LEAST_OBSERVED_BYTES:
            return
        if disk_bytes == 0:
            self.link_bytes_per_s = _moved(self.link_bytes_per_s, num_bytes / seconds)
        elif self._disk_seconds(disk_bytes) > self._link_seconds(num_bytes):
            self.disk_bytes_per_s = _moved(self.disk_bytes_per_s, disk_bytes / seconds)

    def _link_seconds(self, num_bytes: int) -> float:
        return num_bytes / (self.link_bytes_per_s or LINK_BYTES_PER_S)

    def _disk_seconds(self, num_bytes: int) -> float:
        return num_bytes / (self.disk_bytes_per_s or DISK_BYTES_PER_S)


def _moved(rate: float | None, news: float) -> float:
    """A rate after one more observation; the first one is the rate."""
    return news if rate is None else rate + _NEWS_SHARE * (news - rate)
