"""Which runner a device gets."""

from __future__ import annotations

import torch

from ..checkpoint.architecture import ModelConfig
from ..errors import ConfigError
from ..memory.arena import Arena
from ..models.registry import Model
from ..step import RunnerLimits
from .device_runner import DeviceRunner
from .graph_runner import GraphRunner
from .torch_runner import TorchRunner
from .workspace import Workspace


def make_runner(
    model: Model,
    config: ModelConfig,
    *,
    limits: RunnerLimits,
    device: torch.device,
    dtype: torch.dtype,
    kv_arena: Arena | None = None,
    workspace: Workspace | None = None,
    kv_dtype: torch.dtype | None = None,
    enforce_eager: bool = False,
) -> DeviceRunner:
    """The runner for `device`: whole steps as CUDA graphs on a GPU, plain torch on a CPU.

    Args:
        model: Borrowed; its weights are, or will be, on `device`.
        config: Its shape.
        limits: What to hold.
        device: Where steps run.
        dtype: Of weights.
        kv_arena: Where the KV caches lie, in chunks (`KvLayout`); borrowed. None: the runner allocates its own.
        workspace: Shared by the runners of one device; None: the runner has its own.
        kv_dtype: Of KV caches: `dtype`, which None means, or on a GPU float8_e4m3fn.
        enforce_eager: Capture nothing; for finding faults.

    Raises:
        ConfigError: KV caches of a dtype that this device or model does not take.
        CapacityError: No room for KV caches of its own.
    """
    if device.type == "cpu" or not _has_kernels(config, limits):
        if kv_dtype not in (None, dtype):
            raise ConfigError(f"the KV cache is {kv_dtype}, but on {device} it must be {dtype} for this model")
        return TorchRunner(model, config, limits=limits, device=device, dtype=dtype, kv_arena=kv_arena)
    return GraphRunner(
        model,
        config,
        limits=limits,
        dtype=dtype,
        workspace=workspace or Workspace(device),
        kv_arena=kv_arena,
        kv_dtype=kv_dtype,
        enforce_eager=enforce_eager,
    )


def _has_kernels(config: ModelConfig, limits: RunnerLimits) -> bool:
    """Whether attention over lengths on the device takes these heads and blocks."""
    return config.num_attention_heads // config.num_key_value_heads <= 16 and limits.block_size in (16, 32, 64, 128)
