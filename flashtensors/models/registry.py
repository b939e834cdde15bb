"""From an architecture's name to its weights' layout and its model: the only door to this room.

Shapes: T rows of a step, S rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.architecture import ModelConfig
from ..checkpoint.layout import WeightLayout
from ..errors import UnsupportedModel
from ..kernels.attention.batch import AttentionBatch
from .build import build_decoder
from .family import Family
from .gemma import GEMMA3
from .layers import Gate, KvCache, Rotations
from .llama import LLAMA
from .mixtral import MIXTRAL
from .qwen import QWEN
from .qwen_moe import QWEN_MOE
from .weights import decoder_layout

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": QWEN,
        "qwen3": QWEN,
        "gemma3_text": GEMMA3,
        "qwen3_moe": QWEN_MOE,
        "mixtral": MIXTRAL,
    }
)
"""Family of each `model_type`."""


class Model(Protocol):
    """What a runner needs of a model."""

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        kv_caches: Sequence[KvCache],
        batch: AttentionBatch,
        sample_rows_S: Tensor | None,
        *,
        rotations: Rotations | None = None,
        gate: Gate | None = None,
    ) -> Tensor:
        """Logits `[S, V]` of the sampled rows; the caches gain the step's keys and values. See `Decoder.forward`."""
        ...

    def make_rotations(self, num_positions: int) -> Rotations:
        """Tables of the angles of positions 0 … `num_positions` - 1, for `forward`."""
        ...


def weight_layout(config: ModelConfig) -> WeightLayout:
    """The weights of `config`'s model and the checkpoint tensors they are made of; raises `UnsupportedModel`."""
    return decoder_layout(config, _family(config))


def build_model(config: ModelConfig, weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> Model:
    """A model that computes with `weights`.

    Args:
        config: Its shape.
        weights: Every weight of `weight_layout(config)`, contiguous, on one device. On CUDA the model keeps these very
            tensors; on a CPU it keeps packed copies of the projections, in `dtype`, and of the rest these very tensors.
        dtype: Dtype of all weights that the layout gives no other, and of the logits.

    Raises:
        UnsupportedModel: A `model_type` that has no family.
    """
    layout = weight_layout(config)
    for weight in layout.weights:
        tensor = weights[weight.name]
        assert tensor.shape == weight.shape, f"{weight.name} is {tuple(tensor.shape)}, layout says {weight.shape}"
        wanted = dtype if weight.dtype is None else getattr(torch, weight.dtype)
        assert tensor.dtype == wanted, f"{weight.name} is {tensor.dtype}, layout says {wanted}"
    return build_decoder(config, _family(config), weights, dtype=dtype)


def _family(config: ModelConfig) -> Family:
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModel(
            f"model_type {config.model_type!r} has no implementation; there is one of {', '.join(FAMILIES)}"
        )
    return family
