"""Turns a folder into a model that runs: plan its files, read its weights, build its runner and engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from ..checkpoint.architecture import DTYPE_BYTES, ModelConfig, read_model_config
from ..checkpoint.safetensors import open_checkpoint
from ..config import Settings
from ..engine.loop import Engine
from ..errors import ConfigError
from ..memory.arena import Arena
from ..models.registry import build_model, weight_layout
from ..residency.tiers import Demand
from ..runner.capacity import choose_limits, kv_block_bytes
from ..runner.torch_runner import TorchRunner
from ..step import RunnerLimits
from ..transfer.load_plan import LoadPlan, make_load_plan
from ..transfer.pipeline import load
from .device import Device
from .messages import LoadModel
from .sizing import BLOCK_SIZE, find_demand

Progress = Callable[[str, int, int], None]
"""Called with a phase, bytes done and bytes in all."""


@dataclass(kw_only=True)
class LoadedModel:
    """A model on the device: its engine, and what must be given back when it leaves."""

    engine: Engine
    limits: RunnerLimits
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    kv_cache_bytes: int
    dtype: str
    phase_seconds: dict[str, float] = field(default_factory=dict)
    close: Callable[[], None]
    """Gives the weights back, once the engine is gone too."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.weight_bytes + self.kv_cache_bytes


class PlannedModel(Protocol):
    """A model whose files are sound and whose size is known."""

    @property
    def demand(self) -> Demand:
        """Memory that it wants."""
        ...

    def load(self, kv_bytes: int, progress: Progress, cancel: threading.Event) -> LoadedModel:
        """Read and build it with `kv_bytes` for its KV cache; raises `FlashError` and then holds nothing.

        Once `cancel` is set it should raise soon.
        """
        ...


class Loader(Protocol):
    """Plans models; runs in a thread of its own."""

    def plan(self, command: LoadModel) -> PlannedModel:
        """Check the files; raises `FlashError` where they are unsound or the wishes cannot be met."""
        ...


class CheckpointLoader:
    """Loads Hugging Face folders of safetensors onto one device.

    Args:
        settings: Sizes, threads and prefix caching.
        device: Where models go.
        max_queue: Answers that may wait in one model's engine; None: any number.
    """

    def __init__(self, settings: Settings, device: Device, *, max_queue: int | None) -> None:
        self.settings = settings
        self.device = device
        self.max_queue = max_queue

    def plan(self, command: LoadModel) -> PlannedModel:
        """Read the configuration and the headers, and match them."""
        started_s = time.perf_counter()
        folder = Path(command.folder)
        config = read_model_config(folder)
        dtype = choose_dtype(command.dtype, config.dtype, is_cpu=self.device.is_cpu)
        plan = make_load_plan(weight_layout(config), open_checkpoint(folder), dtype)
        block_bytes = kv_block_bytes(config, BLOCK_SIZE, getattr(torch, dtype))
        max_model_len = command.max_model_len or self.settings.max_model_len
        if max_model_len is not None:  # one bound for all models; each keeps to what it was trained for
            max_model_len = min(max_model_len, config.max_position_embeddings)
        demand = find_demand(
            config,
            self.settings,
            self.device,
            weight_bytes=plan.num_bytes,
            block_bytes=block_bytes,
            max_model_len=max_model_len,
        )
        return _PlannedCheckpoint(
            loader=self,
            config=config,
            dtype=dtype,
            plan=plan,
            demand=demand,
            block_bytes=block_bytes,
            max_model_len=max_model_len,
            plan_s=time.perf_counter() - started_s,
        )


@dataclass(frozen=True, kw_only=True)
class _PlannedCheckpoint:
    loader: CheckpointLoader
    config: ModelConfig
    dtype: str
    plan: LoadPlan
    demand: Demand
    block_bytes: int
    max_model_len: int | None
    plan_s: float

    def load(self, kv_bytes: int, progress: Progress, cancel: threading.Event) -> LoadedModel:
        """Read the weights into an arena of their own and build a runner and an engine over it."""
        started_s = time.perf_counter()
        settings = self.loader.settings
        with ExitStack() as held:
            arena = held.enter_context(Arena.allocate(self.plan.num_bytes, self.loader.device.name))
            load(
                self.plan,
                arena,
                num_threads=settings.num_threads,
                chunk_size=settings.chunk_size,
                progress=lambda done_bytes, total_bytes: progress("read", done_bytes, total_bytes),
                cancel=cancel,
            )
            read_s = time.perf_counter()
            progress("prepare", self.plan.num_bytes, self.plan.num_bytes)
            runner = held.enter_context(self._runner(arena, kv_bytes))
            engine = Engine(
                runner, enable_prefix_caching=settings.enable_prefix_caching, max_queue=self.loader.max_queue
            )
            prepared_s = time.perf_counter()
            return LoadedModel(
                engine=engine,
                limits=runner.limits,
                vocab_size=self.config.vocab_size,
                eos_token_ids=self.config.eos_token_ids,
                weight_bytes=self.plan.num_bytes,
                kv_cache_bytes=runner.limits.num_blocks * self.block_bytes,
                dtype=self.dtype,
                phase_seconds={"plan": self.plan_s, "read": read_s - started_s, "prepare": prepared_s - read_s},
                close=held.pop_all().close,
            )

    def _runner(self, arena: Arena, kv_bytes: int) -> TorchRunner:
        settings, dtype, device = (
            self.loader.settings,
            getattr(torch, self.dtype),
            torch.device(self.loader.device.name),
        )
        limits = choose_limits(
            self.config,
            dtype=dtype,
            kv_cache_bytes=kv_bytes,
            max_model_len=self.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_tokens_per_step=settings.max_tokens_per_step,
            block_size=BLOCK_SIZE,
            device=device,
        )
        model = build_model(self.config, self.plan.tensors(arena), dtype=dtype)
        return TorchRunner(model, self.config, limits=limits, device=device, dtype=dtype)


def choose_dtype(wanted: str | None, stored: str, *, is_cpu: bool) -> str:
    """Dtype to compute in.

    What was asked for, else the checkpoint's. A float16 checkpoint on a CPU computes in float32 unless float16 was
    asked for: float32 holds every float16 value exactly, and few CPUs multiply float16 matrices in hardware.

    Raises:
        ConfigError: A dtype that does not run.
    """
    if wanted in (None, "auto"):
        return "float32" if is_cpu and stored == "float16" else stored
    if wanted not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {wanted!r}, but it must be auto, {', '.join(DTYPE_BYTES)}", param="dtype")
    return wanted
