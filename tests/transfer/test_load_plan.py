"""Load plans: where each byte goes, and every way in which a checkpoint can contradict its architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.layout import WeightLayout
from flashtensors.checkpoint.safetensors import Checkpoint, open_checkpoint
from flashtensors.errors import CheckpointError, UnsupportedModel
from flashtensors.memory.arena import ALIGNMENT
from flashtensors.transfer.load_plan import make_copy_plan, make_load_plan

MakeCheckpoint = Callable[..., Path]

SHAPES = {"embed.weight": (10, 4), "q.weight": (4, 4), "k.weight": (2, 4), "v.weight": (2, 4), "norm.weight": (4,)}


@pytest.fixture
def layout(make_layout: Callable[..., WeightLayout]) -> WeightLayout:
    """An embedding, a fused weight and a norm of `SHAPES`."""
    qkv = {name: SHAPES[name] for name in ("q.weight", "k.weight", "v.weight")}
    return make_layout(embedding={"embed.weight": (10, 4)}, qkv=qkv, norm={"norm.weight": (4,)})


@pytest.fixture
def open_with(make_checkpoint: MakeCheckpoint) -> Callable[..., Checkpoint]:
    """The layout's checkpoint after changes: a tensor to add or replace, or None to leave one out."""

    def make(**changes: torch.Tensor | None) -> Checkpoint:
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
        tensors |= {name.replace("__", "."): value for name, value in changes.items()}
        return open_checkpoint(make_checkpoint({name: value for name, value in tensors.items() if value is not None}))

    return make


def test_sources_are_rows_of_aligned_weights_in_execution_order(
    layout: WeightLayout, open_with: Callable[..., Checkpoint]
):
    checkpoint = open_with()
    plan = make_load_plan(layout, checkpoint, "bfloat16")
    assert [tensor.name for tensor in plan.planned_tensors] == ["embedding", "qkv", "norm"]
    assert [tensor.arena_offset for tensor in plan.planned_tensors] == [0, ALIGNMENT, 2 * ALIGNMENT]
    assert plan.num_bytes == 3 * ALIGNMENT
    assert [extent.name for extent in plan.extents] == [
        "embed.weight",
        "q.weight",
        "k.weight",
        "v.weight",
        "norm.weight",
    ]
    assert [extent.arena_offset for extent in plan.extents] == [0, 256, 256 + 32, 256 + 48, 512]
    assert not any(extent.is_converted for extent in plan.extents)
    assert plan.file_bytes == checkpoint.num_bytes == sum(extent.num_bytes for extent in plan.extents)
    for extent in plan.extents:
        entry = checkpoint.tensors[extent.name]
        assert (extent.path, extent.file_offset, extent.num_bytes) == (entry.path, entry.offset, entry.num_bytes)


def test_conversion_moves_the_rows(layout: WeightLayout, open_with: Callable[..., Checkpoint]):
    plan = make_load_plan(layout, open_with(q__weight=torch.ones(4, 4, dtype=torch.float16)), "float32")
    assert all(extent.is_converted for extent in plan.extents)
    assert [extent.arena_offset for extent in plan.extents][1:4] == [256, 256 + 64, 256 + 96]


def test_a_missing_tensor_is_named(layout: WeightLayout, open_with: Callable[..., Checkpoint]):
    with pytest.raises(CheckpointError, match=r"part-0.safetensors: tensor 'k.weight' is missing"):
        make_load_plan(layout, open_with(k__weight=None), "bfloat16")


def test_several_missing_tensors_are_counted(layout: WeightLayout, open_with: Callable[..., Checkpoint]):
    checkpoint = open_with(q__weight=None, k__weight=None, v__weight=None, norm__weight=None)
    with pytest.raises(CheckpointError, match=r"'q.weight', 'k.weight', 'v.weight' and 1 more are missing"):
        make_load_plan(layout, checkpoint, "bfloat16")


def test_an_empty_checkpoint_says_so(layout: WeightLayout):
    with pytest.raises(CheckpointError, match="without tensors"):
        make_load_plan(layout, Checkpoint(tensors={}, num_bytes=0), "bfloat16")


def test_a_wrong_shape_says_found_and_expected(layout: WeightLayout, open_with: Callable[..., Checkpoint]):
    with pytest.raises(CheckpointError, match=r"'k.weight' has shape \[3, 4\], but qkv .* needs \[2, 4\]"):
        make_load_plan(layout, open_with(k__weight=torch.zeros(3, 4, dtype=torch.bfloat16)), "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_weight_of_another_dtype_is_refused(
    layout: WeightLayout, open_with: Callable[..., Checkpoint], dtype: torch.dtype
):
    with pytest.raises(UnsupportedModel, match=r"'k.weight' is (F64|I8|F8_E4M3)"):
        make_load_plan(layout, open_with(k__weight=torch.zeros(2, 4, dtype=dtype)), "bfloat16")


def test_an_unknown_target_dtype_is_refused(layout: WeightLayout, open_with: Callable[..., Checkpoint]):
    with pytest.raises(UnsupportedModel, match="'int4'"):
        make_load_plan(layout, open_with(), "int4")


@pytest.mark.parametrize("name", ["adapter.weight", "q.bias", "lm_head.bias", "model.vision_towers.x"])
def test_a_tensor_that_nobody_uses_is_refused(layout: WeightLayout, open_with: Callable[..., Checkpoint], name: str):
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is unknown to the architecture"):
        make_load_plan(layout, open_with(**{name: torch.zeros(4)}), "bfloat16")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.encoder.weight",
        "model.multi_modal_projector.mm_input_projection_weight",
    ],
)
def test_harmless_tensors_are_left_out(layout: WeightLayout, open_with: Callable[..., Checkpoint], name: str):
    plan = make_load_plan(layout, open_with(**{name: torch.zeros(4)}), "bfloat16")
    assert name not in [extent.name for extent in plan.extents]


def test_a_tied_head_is_left_out_only_if_it_can_be_the_embedding(
    layout: WeightLayout, open_with: Callable[..., Checkpoint]
):
    plan = make_load_plan(layout, open_with(lm_head__weight=torch.zeros(10, 4)), "bfloat16")
    assert "lm_head.weight" not in [extent.name for extent in plan.extents]
    with pytest.raises(CheckpointError, match="lm_head"):
        make_load_plan(layout, open_with(lm_head__weight=torch.zeros(11, 4)), "bfloat16")


def test_a_copy_plan_keeps_names_shapes_and_dtypes(make_checkpoint: MakeCheckpoint):
    tensors = {"a": torch.zeros(3, dtype=torch.bool), "b": torch.zeros(()), "c": torch.zeros(0, 2)}
    plan = make_copy_plan(open_checkpoint(make_checkpoint(tensors)).tensors.values())
    found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in plan.planned_tensors}
    assert found == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert all(tensor.arena_offset % ALIGNMENT == 0 for tensor in plan.planned_tensors)
