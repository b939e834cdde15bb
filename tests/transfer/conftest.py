"""Tiny checkpoints for the transfer room, with the layouts that fit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from flashtensors.checkpoint.layout import Weight, WeightLayout


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors with the safetensors library, in one file or several; returns the folder."""

    def make(*shards: dict[str, torch.Tensor]) -> Path:
        for index, tensors in enumerate(shards):
            safetensors.torch.save_file(tensors, tmp_path / f"part-{index}.safetensors")
        return tmp_path

    return make


@pytest.fixture
def make_layout() -> Callable[..., WeightLayout]:
    """A layout from weight name to its sources and their shapes."""

    def make(**weights: dict[str, tuple[int, ...]]) -> WeightLayout:
        return WeightLayout(
            weights=tuple(
                Weight(
                    name=name,
                    shape=(sum(shape[0] for shape in sources.values()), *next(iter(sources.values()))[1:]),
                    sources=tuple(sources),
                    source_shapes=tuple(sources.values()),
                )
                for name, sources in weights.items()
            )
        )

    return make
