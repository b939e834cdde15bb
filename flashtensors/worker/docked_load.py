"""Models on a GPU: the way from files, or the host tier, to a dock.

    take a dock ─▶ map weights ─▶ queue copies ─▶ map the KV cache, moor the runner ─▶ ready ─▶ all has landed

From `ready` on the engine may run: its runner lets each layer wait on the device until the layer's weights are there.
"""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import msgspec
import torch

from ..checkpoint.architecture import ModelConfig
from ..config import Settings
from ..engine.loop import Engine
from ..errors import TransferError
from ..models.registry import build_model
from ..residency.tiers import Demand
from ..runner.capacity import choose_limits
from ..runner.device_runner import DeviceRunner
from ..runner.kv_layout import KvLayout
from ..runner.make import make_runner
from ..step import RunnerLimits, StepPostponed
from ..transfer.host_image import HostImage
from ..transfer.layer_events import LayerEvents
from ..transfer.load_plan import LoadPlan
from ..transfer.pipeline import LoadStats, fill_image, load
from .digest_store import KnownDigests
from .docks import Dock, DockKey
from .harbour import Harbour
from .kept_cache import KeptCache
from .loading import Grant, LoadedModel, OnReady, Progress
from .moored_runner import MooredRunner


@dataclass(frozen=True, kw_only=True)
class DockedPlan:
    """A planned model of a GPU; implements `loading.PlannedModel`."""

    harbour: Harbour
    settings: Settings
    config: ModelConfig
    dtype: str
    plan: LoadPlan
    image: HostImage
    key: DockKey
    demand: Demand
    layout: KvLayout
    max_queue: int | None
    digests: KnownDigests | None
    plan_s: float

    @property
    def host_bytes(self) -> int:
        """Bytes of the complete image in the host tier."""
        return self.image.full_num_bytes

    def load(self, grant: Grant, progress: Progress, cancel: threading.Event, on_ready: OnReady) -> LoadStats:
        """Bring the model to a dock; see `loading.PlannedModel`."""
        assert grant.kept is None or isinstance(grant.kept, KeptCache), "a cache of another loader"
        self.image.grow_to(grant.host_bytes)
        try:
            return DockedLoad(self, grant, grant.kept, on_ready).run(progress, cancel)
        finally:
            self._remember()

    def fill(self, host_bytes: int, progress: Progress, cancel: threading.Event) -> LoadStats:
        """Read the model into the host tier alone."""
        self.image.grow_to(host_bytes)
        try:
            return fill_image(
                self.image,
                num_threads=self.harbour.num_threads,
                progress=lambda done_bytes, total_bytes: progress("read", done_bytes, total_bytes),
                cancel=cancel,
                check=None if self.digests is None else self.digests.check,
            )
        finally:
            self._remember()

    def find_limits(self, kv_bytes: int) -> RunnerLimits:
        """Limits of a runner whose KV cache has `kv_bytes`; raises as `choose_limits`."""
        layout, max_model_len = self.layout, self.key.max_model_len
        return find_limits(self.config, self.settings, layout, max_model_len, kv_bytes, self.harbour.device)

    def _remember(self) -> None:
        """Note what the host tier holds now, and digests of what was read."""
        self.harbour.tier.note()
        if self.digests is not None:
            self.digests.save()


def find_limits(
    config: ModelConfig,
    settings: Settings,
    layout: KvLayout,
    max_model_len: int | None,
    kv_bytes: int,
    device: torch.device,
) -> RunnerLimits:
    """Limits of a runner whose KV cache has whole chunks in `kv_bytes`; raises as `choose_limits`."""
    return choose_limits(
        config,
        dtype=layout.dtype,
        kv_cache_bytes=layout.num_blocks(kv_bytes) * layout.block_bytes,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_tokens_per_step=settings.max_tokens_per_step,
        block_size=layout.unit_shape[1],
        device=device,
    )


@dataclass(slots=True)
class DockedLoad:
    """One load of a planned model."""

    planned: DockedPlan
    grant: Grant
    kept: KeptCache | None
    on_ready: OnReady
    events: LayerEvents = field(default_factory=LayerEvents)
    marks: dict[str, float] = field(default_factory=dict)
    """When each phase ended."""

    def run(self, progress: Progress, cancel: threading.Event) -> LoadStats:
        """Do all of it; before `on_ready` an error gives back whatever was taken."""
        self._mark("")
        planned, docks = self.planned, self.planned.harbour.docks
        phase = "copy" if planned.image.is_complete else "read"
        with ExitStack() as held:
            if self.kept is not None:
                held.callback(self.kept.close)
            limits = planned.find_limits(self.grant.kv_bytes)
            dock = docks.take(planned.key, planned.plan.num_bytes)
            held.callback(docks.give_back, dock)
            dock.weights.map(in_parts=True)
            self._mark("map")
            stats = load(
                planned.plan,
                dock.weights,
                num_threads=planned.harbour.num_threads,
                progress=lambda done_bytes, total_bytes: progress(phase, done_bytes, total_bytes),
                cancel=cancel,
                image=planned.image,
                check=None if planned.digests is None else planned.digests.check,
                events=self.events,
                on_near=lambda: self._get_ready(dock, limits, held, cancel),
            )
        if dock.runner is not None:
            dock.runner.gate_open()
        self._mark("copy")
        late_s = self.events.queued_s - self.marks["prepare"]
        if late_s > 0:  # files were read when the model was prepared already
            self.marks["read"] += late_s
            self.marks["prepare"] += late_s
        return replace(stats, phase_seconds=self._phase_seconds())

    def _get_ready(self, dock: Dock, limits: RunnerLimits, held: ExitStack, cancel: threading.Event) -> None:
        """Put a KV cache and an engine behind the weights that are on their way."""
        self._mark("read")
        if cancel.is_set():
            raise TransferError("the load was cancelled")
        if self.kept is not None:
            self.kept.attach(dock.kv)
        else:
            dock.kv.map(self.grant.kv_bytes)
        if dock.runner is None:
            dock.runner = self._make_runner(dock)
        dock.runner.dock(limits.num_blocks, _LandingGate(self.events, self.planned.harbour.device))
        engine, moored = self._engine(dock.runner, limits)
        self._mark("prepare")
        loaded = self._loaded(dock, engine, moored)
        self.on_ready(loaded)
        held.pop_all()

    def _engine(self, runner: DeviceRunner, limits: RunnerLimits) -> tuple[Engine, MooredRunner]:
        if self.kept is not None:
            self.kept.runner.moor(runner)
            return self.kept.engine, self.kept.runner
        settings = self.planned.settings
        # The dock's slots are as long as any KV cache allows; this model's cache may hold less.
        moored = MooredRunner(runner, msgspec.structs.replace(runner.limits, max_model_len=limits.max_model_len))
        engine = Engine(moored, enable_prefix_caching=settings.enable_prefix_caching, max_queue=self.planned.max_queue)
        return engine, moored

    def _make_runner(self, dock: Dock) -> DeviceRunner:
        planned, dtype = self.planned, getattr(torch, self.planned.dtype)
        with planned.harbour.own_stream():
            return make_runner(
                build_model(planned.config, planned.plan.tensors(dock.weights), dtype=dtype),
                planned.config,
                limits=planned.find_limits(dock.kv.num_bytes),
                device=planned.harbour.device,
                dtype=dtype,
                kv_arena=dock.kv,
                workspace=planned.harbour.workspace,
                kv_dtype=planned.layout.dtype,
                enforce_eager=planned.settings.enforce_eager,
            )

    def _loaded(self, dock: Dock, engine: Engine, moored: MooredRunner) -> LoadedModel:
        planned, harbour = self.planned, self.planned.harbour

        def close(*, keeps_kv: bool = False) -> KeptCache | None:
            is_sound = not engine.has_work
            if not is_sound:
                harbour.wait_for_steps()
            kept = None
            if keeps_kv and is_sound:
                kept = KeptCache(engine, moored, dock.kv)
            harbour.docks.give_back(dock, is_sound=is_sound)
            return kept

        return LoadedModel(
            engine=engine,
            limits=moored.limits,
            vocab_size=planned.config.vocab_size,
            eos_token_ids=planned.config.eos_token_ids,
            weight_bytes=dock.weights.mapped_bytes,
            kv_cache_bytes=dock.kv.mapped_bytes,
            dtype=planned.config.describe_dtype(planned.dtype),
            phase_seconds=self._phase_seconds(),
            close=close,
        )

    def _mark(self, phase: str) -> None:
        self.marks[phase] = time.perf_counter()

    def _phase_seconds(self) -> dict[str, float]:
        """Seconds of each phase so far; `plan` was spent once, when the plan was made."""
        pairs = itertools.pairwise(self.marks.items())
        return {"plan": self.planned.plan_s} | {phase: end_s - start_s for (_, start_s), (phase, end_s) in pairs}


STEP_PATIENCE_S = 0.5
"""A step waits so long for files, in the thread that launches the steps of all models; then it is postponed."""


class _LandingGate:
    """Makes the current stream wait for a layer, or for everything; implements `models.layers.Gate`."""

    def __init__(self, events: LayerEvents, device: torch.device) -> None:
        self._events = events
        self._device = device
        self._deadline_s = 0.0

    def __call__(self, layer: int | None) -> None:
        now_s = time.monotonic()
        if layer == 0:  # a step begins
            self._deadline_s = now_s + STEP_PATIENCE_S
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if not self._events.wait(layer, stream, max(0.0, self._deadline_s - now_s)):
            raise StepPostponed
