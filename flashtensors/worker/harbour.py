"""What the models of one device share: its memory, the docks in it, the host tier, and the runners' workspace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..checkpoint.chunk_digests import DIGEST_CHUNK_BYTES
from ..config import Settings
from ..kernels.binaries import keep_binaries_in
from ..memory.cuda_driver import CudaMemoryDriver
from ..memory.device_pool import DevicePool
from ..memory.pinning import find_pinning
from ..runner.workspace import Workspace
from ..transfer.pipeline import CHUNK_SIZE, RING_PAGES_PER_THREAD
from .device import Device
from .docks import Docks
from .host_memory import find_pool_bytes
from .host_tier import HostTier
from .kernel_warmer import KernelWarmer

NUM_THREADS = 16
"""Threads that read to a GPU where the settings do not say: its link takes what 16 of them copy from the page cache."""


@dataclass(frozen=True, kw_only=True)
class Harbour:
    """Docks, host tier and workspace of one device."""

    device: torch.device
    docks: Docks
    tier: HostTier
    workspace: Workspace | None
    num_threads: int
    """That read."""
    warmer: KernelWarmer | None = None
    """Compiles ahead; None: nothing is."""

    @classmethod
    def open(
        cls, settings: Settings, device: Device, *, is_embedded: bool = False, host_pool_fd: int | None = None
    ) -> Harbour:
        """Open a GPU. The host pool is made in the background; device memory is taken as models need it.

        Args:
            settings: Sizes and threads.
            device: The GPU.
            is_embedded: One caller's model: the host pool is small unless a size was set.
            host_pool_fd: A memory file to make the host pool in, which outlives this process; borrowed.

        Raises:
            BackendUnavailable: A package that drives the GPU's memory is missing.
            CapacityError: The system does not give the host pool's memory.
        """
        binaries = keep_binaries_in(settings.kernel_store, torch.cuda.get_device_capability(device.name))
        num_threads = settings.num_threads or NUM_THREADS
        pool = DevicePool(CudaMemoryDriver(device.name), device.budget_bytes)
        tier = HostTier.open(
            find_pool_bytes(settings, is_embedded=is_embedded),
            chunk_bytes=find_chunk_bytes(settings),
            ring_pages=RING_PAGES_PER_THREAD * num_threads + 1,
            pinning=find_pinning(device.name),
            num_threads=num_threads,
            fd=host_pool_fd,
        )
        torch_device = pool.driver.device
        return cls(
            device=torch_device,
            docks=Docks(pool),
            tier=tier,
            workspace=Workspace(torch_device),
            num_threads=num_threads,
            warmer=KernelWarmer(binaries, device.name),
        )

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Keep what this thread queues apart from steps and captures of graphs; at the end it has run."""
        if self.device.type == "cpu":
            yield
            return
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def wait_for_steps(self) -> None:
        """Wait until no runner's kernels are under way; copies go on."""
        if self.workspace is not None:
            self.workspace.wait_for_steps()

    def close(self) -> None:
        """Give all memory back; every model has left."""
        if self.warmer is not None:
            self.warmer.close()
        self.docks.close()
        if self.workspace is not None:
            self.workspace.close()
        self.docks.pool.close()
        self.tier.close()


def find_chunk_bytes(settings: Settings) -> int:
    """Bytes of a file in one page of the host pool: whole chunks of digests, where those are checked."""
    unit = DIGEST_CHUNK_BYTES if settings.verify_digests else 4096
    return max(unit, (settings.chunk_size or CHUNK_SIZE) // unit * unit)
