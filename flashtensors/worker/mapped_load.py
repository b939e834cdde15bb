"""Models on a CPU: weights are used where they lie in their files, as far as the architecture lets them."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from ..checkpoint.architecture import ModelConfig
from ..config import Settings
from ..engine.loop import Engine
from ..memory.arena import Arena
from ..models.registry import build_model
from ..residency.tiers import Demand
from ..runner.capacity import choose_limits
from ..runner.device_runner import DeviceRunner
from ..runner.make import make_runner
from ..transfer.chunk_reads import check_chunks, find_chunks
from ..transfer.load_plan import LoadPlan
from ..transfer.mapped import MappedWeights, map_weights
from ..transfer.pipeline import CHUNK_SIZE, NUM_THREADS, LoadStats, load
from .digest_store import KnownDigests
from .loading import Grant, KeptKv, LoadedModel, OnReady, Progress
from .sizing import KvSteps

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class MappedPlan:
    """A planned model of a CPU; implements `loading.PlannedModel`."""

    settings: Settings
    config: ModelConfig
    dtype: str
    plan: LoadPlan
    demand: Demand
    kv: KvSteps
    max_model_len: int | None
    max_queue: int | None
    digests: KnownDigests | None
    plan_s: float
    host_bytes: int = 0
    """There is no host tier beside a CPU."""

    def load(self, grant: Grant, progress: Progress, cancel: threading.Event, on_ready: OnReady) -> LoadStats:
        """Map what can be used in place, read the rest, and build a runner and an engine over both."""
        started_s = time.perf_counter()
        with ExitStack() as held:
            mapped = map_weights(self.plan)
            with Arena.allocate(mapped.rest.num_bytes) as arena:
                stats = self._read(mapped, arena, progress, cancel)
                read_s = time.perf_counter()
                progress("prepare", self.plan.file_bytes, self.plan.file_bytes)
                weights = mapped.tensors | mapped.rest.tensors(arena)
                runner = self._runner(weights, grant.kv_bytes)
            held.callback(runner.close)
            engine = Engine(runner, enable_prefix_caching=self.settings.enable_prefix_caching, max_queue=self.max_queue)
            seconds = {"plan": self.plan_s, "read": read_s - started_s, "prepare": time.perf_counter() - read_s}
            on_ready(self._loaded(engine, runner, seconds, held))
        if self.digests is not None:
            self.digests.save()
        return replace(stats, num_bytes=self.plan.file_bytes, phase_seconds=seconds)

    def fill(self, host_bytes: int, progress: Progress, cancel: threading.Event) -> LoadStats:
        """Nothing to do: there is no host tier."""
        return LoadStats(num_bytes=0, phase_seconds={}, reader="none")

    def _read(self, mapped: MappedWeights, arena: Arena, progress: Progress, cancel: threading.Event) -> LoadStats:
        """Bring the rest to the arena, and check all that is used."""
        num_threads = self.settings.num_threads or NUM_THREADS
        total_bytes = self.plan.file_bytes
        mapped_bytes = total_bytes - mapped.rest.file_bytes
        check = None if self.digests is None else self.digests.check
        num_checked = 0 if check is None else check.num_checked
        if check is not None:
            chunks = find_chunks(self.plan.extents) - find_chunks(mapped.rest.extents)
            check_chunks(
                self.plan,
                chunks,
                check,
                num_threads=num_threads,
                cancel=cancel,
                progress=lambda done, all_: progress("read", max(0, mapped_bytes - (all_ - done)), total_bytes),
            )
        stats = load(
            mapped.rest,
            arena,
            num_threads=num_threads,
            chunk_size=self.settings.chunk_size or CHUNK_SIZE,
            progress=lambda done_bytes, _: progress("read", mapped_bytes + done_bytes, total_bytes),
            cancel=cancel,
            check=check,
        )
        reader = "mmap" if not mapped.rest.extents else f"{stats.reader} and mmap" if mapped.tensors else stats.reader
        return replace(stats, reader=reader, num_checked=0 if check is None else check.num_checked - num_checked)

    def _runner(self, weights: dict[str, torch.Tensor], kv_bytes: int) -> DeviceRunner:
        dtype = getattr(torch, self.dtype)
        limits = choose_limits(
            self.config,
            dtype=dtype,
            kv_cache_bytes=kv_bytes,
            max_model_len=self.max_model_len,
            max_num_seqs=self.settings.max_num_seqs,
            max_tokens_per_step=self.settings.max_tokens_per_step,
            block_size=self.kv.block_size,
            device=_CPU,
        )
        model = build_model(self.config, weights, dtype=dtype)
        return make_runner(model, self.config, limits=limits, device=_CPU, dtype=dtype)

    def _loaded(self, engine: Engine, runner: DeviceRunner, seconds: dict[str, float], held: ExitStack) -> LoadedModel:
        resources = held.pop_all()

        def close(*, keeps_kv: bool = False) -> KeptKv | None:
            resources.close()
            return None

        return LoadedModel(
            engine=engine,
            limits=runner.limits,
            vocab_size=self.config.vocab_size,
            eos_token_ids=self.config.eos_token_ids,
            weight_bytes=self.demand.fixed_bytes,
            kv_cache_bytes=runner.limits.num_blocks * self.kv.block_bytes,
            dtype=self.config.describe_dtype(self.dtype),
            phase_seconds=seconds,
            close=close,
        )
