"""Docks in host memory, for tests: small handles and pages, and tiny checkpoints that are loaded to them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashtensors.config import Settings
from flashtensors.memory.device_pool import DevicePool, MemoryDriver
from flashtensors.memory.host_driver import HostMemoryDriver
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.worker.checkpoint_loader import CheckpointLoader
from flashtensors.worker.device import Device
from flashtensors.worker.docked_load import DockedPlan
from flashtensors.worker.docks import Docks
from flashtensors.worker.harbour import Harbour
from flashtensors.worker.host_tier import HostTier
from flashtensors.worker.loading import Grant, KeptKv, LoadedModel
from flashtensors.worker.messages import LoadModel

HANDLE_BYTES = 1024**2
CHUNK_BYTES = 64 * 1024
PAGE_BYTES = CHUNK_BYTES + 4096
RING_PAGES = 5


def make_harbour(
    *, num_handles: int = 64, num_pages: int = 40, fd: int | None = None, driver: MemoryDriver | None = None
) -> Harbour:
    """Docks over memory files, and a host tier over plain memory."""
    pool = DevicePool(driver or HostMemoryDriver(), num_handles * HANDLE_BYTES, handle_bytes=HANDLE_BYTES)
    tier = HostTier.open(
        num_pages * PAGE_BYTES, chunk_bytes=CHUNK_BYTES, ring_pages=RING_PAGES, pinning=None, num_threads=2, fd=fd
    )
    return Harbour(device=torch.device("cpu"), docks=Docks(pool), tier=tier, workspace=None, num_threads=2)


def make_loader(harbour: Harbour, store: Path, **settings: object) -> CheckpointLoader:
    """A loader of that harbour; digests need pages of 16 MiB, so they are off unless asked for."""
    chosen = {"device": "cpu", "max_num_seqs": 4, "verify_digests": False, "storage_path": str(store), **settings}
    budget_bytes = harbour.docks.pool.num_handles * HANDLE_BYTES
    device = Device(name="cpu", description="docks in host memory", budget_bytes=budget_bytes)
    return CheckpointLoader(Settings(**chosen), device, max_queue=None, harbour=harbour)  # pyright: ignore


def plan_model(loader: CheckpointLoader, model: str, folder: Path, *, max_model_len: int | None = None) -> DockedPlan:
    """A planned model, of the kind that docks."""
    planned = loader.plan(LoadModel(model=model, folder=str(folder), max_model_len=max_model_len))
    assert isinstance(planned, DockedPlan)
    return planned


@dataclass
class Loading:
    """One load, and all that it said."""

    planned: DockedPlan
    host_bytes: int = 0
    kept: KeptKv | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    on_progress: Callable[[str, int, int], None] = lambda phase, done_bytes, total_bytes: None
    on_ready: Callable[[LoadedModel], None] = lambda loaded: None
    ready: list[LoadedModel] = field(default_factory=list)

    def run(self) -> LoadedModel:
        """Load with the least that the model wants, or with the cache that was kept."""
        kv_bytes = self.planned.demand.min_flexible_bytes if self.kept is None else self.kept.num_bytes
        grant = Grant(kv_bytes=kv_bytes, host_bytes=self.host_bytes, kept=self.kept)
        self.stats = self.planned.load(grant, self.on_progress, self.cancel, self._take)
        return self.ready[0]

    def _take(self, loaded: LoadedModel) -> None:
        self.ready.append(loaded)
        self.on_ready(loaded)


def generate(loaded: LoadedModel, *, prompt: list[int] | None = None, max_tokens: int = 12) -> list[int]:
    """Greedy tokens of the loaded model's engine."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    prompt = prompt or [5, 9, 17, 3]
    loaded.engine.add(EngineRequest(request_id="r", model="m", prompt_token_ids=prompt, sampling=sampling), ())
    token_ids: list[int] = []
    while loaded.engine.has_work:
        for delta in loaded.engine.step():
            token_ids += delta.token_ids
    return token_ids
