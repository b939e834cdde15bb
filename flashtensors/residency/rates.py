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
    """Bytes per second of the link to the device and of the disk; every observed load moves them."""

    link_bytes_per_s: float = LINK_BYTES_PER_S
    disk_bytes_per_s: float = DISK_BYTES_PER_S

    def seconds_to_load(self, num_bytes: int, host_bytes: int) -> float:
        """Seconds until a model of `num_bytes` is on the device when `host_bytes` of it are in host memory.

        Disk and link work at the same time, so the slower one counts.
        """
        disk_bytes = max(0, num_bytes - host_bytes)
        return max(disk_bytes / self.disk_bytes_per_s, num_bytes / self.link_bytes_per_s)

    def observe(self, *, disk_bytes: int, num_bytes: int, seconds: float) -> None:
        """Learn from a load of `num_bytes`, of which `disk_bytes` were read from disk."""
        if seconds <= 0 or (disk_bytes or num_bytes) < LEAST_OBSERVED_BYTES:
            return
        if disk_bytes == 0:
            self.link_bytes_per_s += _NEWS_SHARE * (num_bytes / seconds - self.link_bytes_per_s)
        elif disk_bytes / self.disk_bytes_per_s > num_bytes / self.link_bytes_per_s:
            self.disk_bytes_per_s += _NEWS_SHARE * (disk_bytes / seconds - self.disk_bytes_per_s)
