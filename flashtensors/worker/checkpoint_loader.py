"""Turns a folder into a planned model: reads its configuration and headers, matches them, and sizes it."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import torch

from ..checkpoint.architecture import DTYPE_BYTES, ModelConfig, read_model_config
from ..checkpoint.safetensors import open_checkpoint
from ..config import Settings
from ..errors import ConfigError
from ..models.registry import weight_layout
from ..runner.capacity import block_size, find_kv_dtype
from ..runner.kv_layout import KvLayout
from ..runner.rehearsal import StepKinds
from ..transfer.load_plan import LoadPlan, make_load_plan
from .device import Device
from .digest_store import KnownDigests, find_digests_file
from .docked_load import DockedPlan, find_limits
from .docks import DockKey
from .harbour import Harbour
from .host_tier import HostTier
from .loading import PlannedModel
from .mapped_load import MappedPlan
from .messages import LoadModel, Register
from .sizing import KvSteps, find_demand


class CheckpointLoader:
    """Loads Hugging Face folders of safetensors onto one device.

    Args:
        settings: Sizes, threads and prefix caching.
        device: Where models go.
        max_queue: Answers that may wait in one model's engine; None: any number.
        is_embedded: For one caller's model.
        host_pool_fd: A memory file for the host pool, which outlives this process; borrowed.
        harbour: What models of a device share; None: on a GPU it is opened, on a CPU there is none.

    Raises:
        BackendUnavailable, CapacityError: As `Harbour.open`.
    """

    def __init__(
        self,
        settings: Settings,
        device: Device,
        *,
        max_queue: int | None,
        is_embedded: bool = False,
        host_pool_fd: int | None = None,
        harbour: Harbour | None = None,
    ) -> None:
        self.settings = settings
        self.device = device
        self.max_queue = max_queue
        if harbour is None and not device.is_cpu:
            harbour = Harbour.open(settings, device, is_embedded=is_embedded, host_pool_fd=host_pool_fd)
        self._harbour = harbour
        self._digests: dict[str, KnownDigests] = {}  # of each model's last plan
        self.host_tier = HostTier(None) if harbour is None else harbour.tier
        """Models in host memory, for whoever decides what stays there."""

    def expect(self, command: Register | LoadModel) -> None:
        """Have what a model's steps run compiled, where that is not done; see `Loader.expect`."""
        harbour = self._harbour
        if harbour is not None and harbour.warmer is not None:
            harbour.warmer.want(functools.partial(self._find_kinds, harbour, command))

    def _find_kinds(self, harbour: Harbour, command: Register | LoadModel) -> StepKinds:
        config = read_model_config(Path(command.folder))
        dtype = choose_dtype(command.dtype, config.dtype, is_cpu=False)
        layout = self._layout(config, dtype, harbour.device)
        kv_bytes = harbour.docks.pool.num_handles * harbour.docks.pool.handle_bytes
        max_model_len = self._bound_length(command, config)
        limits = find_limits(config, self.settings, layout, max_model_len, kv_bytes, harbour.device)
        return StepKinds.of(config, limits, dtype=dtype, kv_dtype=str(layout.dtype).removeprefix("torch."))

    def _layout(self, config: ModelConfig, dtype: str, device: torch.device) -> KvLayout:
        kv_dtype = find_kv_dtype(self.settings.kv_cache_dtype, getattr(torch, dtype), device)
        return KvLayout(config, block_size(device), kv_dtype)

    def _bound_length(self, command: Register | LoadModel, config: ModelConfig) -> int | None:
        """The context that was asked for; one bound is for all models, and each keeps to what it was trained for."""
        max_model_len = command.max_model_len or self.settings.max_model_len
        return None if max_model_len is None else min(max_model_len, config.max_position_embeddings)

    def plan(self, command: LoadModel) -> PlannedModel:
        """Read the configuration and the headers, and match them; raises `FlashError` where they do not."""
        started_s = time.perf_counter()
        folder = Path(command.folder)
        config, dtype, plan = plan_files(folder, command.dtype, is_cpu=self.device.is_cpu)
        max_model_len = self._bound_length(command, config)
        digests = None
        if self.settings.verify_digests:
            kept = find_digests_file(self.settings.store, command.model, folder)
            digests = KnownDigests(plan, kept, self._digests.get(command.model))
            self._digests[command.model] = digests
        if self._harbour is None:
            return self._plan_mapped(config, dtype, plan, max_model_len, digests, started_s)
        return self._plan_docked(self._harbour, command.model, config, dtype, plan, max_model_len, digests, started_s)

    def close(self) -> None:
        """Give back what models share; none is loaded any more."""
        if self._harbour is not None:
            self._harbour.close()

    def _plan_mapped(
        self,
        config: ModelConfig,
        dtype: str,
        plan: LoadPlan,
        max_model_len: int | None,
        digests: KnownDigests | None,
        started_s: float,
    ) -> MappedPlan:
        cpu = torch.device("cpu")
        size, kv_dtype = block_size(cpu), find_kv_dtype(self.settings.kv_cache_dtype, getattr(torch, dtype), cpu)
        layout = KvLayout(config, size, kv_dtype, chunk_blocks=1)
        kv = KvSteps(block_size=size, chunk_blocks=1, chunk_bytes=layout.chunk_bytes, step_bytes=layout.chunk_bytes)
        return MappedPlan(
            settings=self.settings,
            config=config,
            dtype=dtype,
            plan=plan,
            demand=find_demand(
                config,
                self.settings,
                self.device,
                weight_bytes=_widened_bytes(plan, getattr(torch, dtype)),
                kv=kv,
                max_model_len=max_model_len,
            ),
            kv=kv,
            max_model_len=max_model_len,
            max_queue=self.max_queue,
            digests=digests,
            plan_s=time.perf_counter() - started_s,
        )

    def _plan_docked(
        self,
        harbour: Harbour,
        model: str,
        config: ModelConfig,
        dtype: str,
        plan: LoadPlan,
        max_model_len: int | None,
        digests: KnownDigests | None,
        started_s: float,
    ) -> DockedPlan:
        pool = harbour.docks.pool
        layout = self._layout(config, dtype, harbour.device)
        kv = KvSteps(
            block_size=layout.unit_shape[1],
            chunk_blocks=layout.chunk_blocks,
            chunk_bytes=layout.chunk_bytes,
            step_bytes=pool.handle_bytes,
        )
        return DockedPlan(
            harbour=harbour,
            settings=self.settings,
            config=config,
            dtype=dtype,
            plan=plan,
            image=harbour.tier.open_image(model, plan),
            key=DockKey.of(plan.signature, config, dtype, self.settings.kv_cache_dtype, max_model_len),
            demand=find_demand(
                config,
                self.settings,
                self.device,
                weight_bytes=pool.round_up(plan.num_bytes),
                kv=kv,
                max_model_len=max_model_len,
            ),
            layout=layout,
            max_queue=self.max_queue,
            digests=digests,
            plan_s=time.perf_counter() - started_s,
        )


def plan_files(folder: Path, wanted_dtype: str | None, *, is_cpu: bool) -> tuple[ModelConfig, str, LoadPlan]:
    """Read a folder's configuration and headers, and match them.

    Returns:
        The configuration, the dtype to compute in, and what is to be loaded.

    Raises:
        CheckpointError: They do not match, or are damaged.
        ConfigError: As `choose_dtype`.
    """
    config = read_model_config(folder)
    dtype = choose_dtype(wanted_dtype, config.dtype, is_cpu=is_cpu)
    return config, dtype, make_load_plan(weight_layout(config), open_checkpoint(folder), dtype)


def _widened_bytes(plan: LoadPlan, dtype: torch.dtype) -> int:
    """Memory of a plan's weights on a CPU, which computes with those in fp8 as `dtype`."""
    in_fp8 = (tensor for tensor in plan.planned_tensors if tensor.dtype == torch.float8_e4m3fn)
    return plan.num_bytes + sum(math.prod(tensor.shape) * (dtype.itemsize - 1) for tensor in in_fp8)


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
