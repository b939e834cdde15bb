"""Weights used in place: the same tensors as loading gives, without their bytes in the arena."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.layout import WeightLayout
from flashtensors.checkpoint.safetensors import open_checkpoint, write_safetensors
from flashtensors.errors import CheckpointError
from flashtensors.memory.arena import Arena
from flashtensors.transfer.load_plan import LoadPlan, make_copy_plan, make_load_plan
from flashtensors.transfer.mapped import MAPPED_ALIGNMENT, map_weights
from flashtensors.transfer.pipeline import load

SHAPES = {"embed": (32, 32), "q": (32, 32), "k": (64, 32), "odd": (3,), "out": (32, 32)}


@pytest.fixture
def plan(make_layout: Callable[..., WeightLayout], tmp_path: Path) -> LoadPlan:
    """An embedding, a fused weight, a tensor that puts the one after it out of line, and that one."""
    write(tmp_path / "model.safetensors")
    layout = make_layout(
        embed={"embed": SHAPES["embed"]},
        qk={name: SHAPES[name] for name in ("q", "k")},
        odd={"odd": SHAPES["odd"]},
        out={"out": SHAPES["out"]},
    )
    return make_load_plan(layout, open_checkpoint(tmp_path), "float32")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(path: Path) -> None:
    entries = [(name, "F32", tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in tensors().items()]
    write_safetensors(path, entries)


def assert_same(plan: LoadPlan) -> set[str]:
    """Load both ways; returns what was mapped."""
    mapped = map_weights(plan)
    with Arena.allocate(plan.num_bytes) as whole, Arena.allocate(mapped.rest.num_bytes) as rest:
        load(plan, whole)
        load(mapped.rest, rest)
        found = mapped.tensors | mapped.rest.tensors(rest)
        expected = plan.tensors(whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    return set(mapped.tensors)


def test_single_aligned_tensors_are_mapped_and_others_loaded(plan: LoadPlan):
    assert assert_same(plan) == {"embed", "odd"}, "q|k is fused, and `odd` puts `out` out of line"
    assert map_weights(plan).rest.num_bytes < plan.num_bytes
    assert all(tensor.data_ptr() % MAPPED_ALIGNMENT == 0 for tensor in map_weights(plan).tensors.values())


def test_converted_tensors_are_loaded(make_layout: Callable[..., WeightLayout], plan: LoadPlan):
    checkpoint = open_checkpoint(next(iter(plan.files)).parent)
    layout = make_layout(**{name: {name: shape} for name, shape in SHAPES.items()})
    assert assert_same(make_load_plan(layout, checkpoint, "bfloat16")) == set()


def test_empty_tensors_and_copy_plans(tmp_path: Path):
    entries = [("a", "I64", (8,), bytes(range(64))), ("b", "U8", (0, 3), b""), ("c", "U8", (), b"x")]
    write_safetensors(tmp_path / "model.safetensors", entries)
    assert assert_same(make_copy_plan(open_checkpoint(tmp_path).tensors.values())) == {"a", "c"}


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(plan: LoadPlan):
    (path,) = plan.files
    before = path.read_bytes()
    map_weights(plan).tensors["embed"].zero_()
    assert path.read_bytes() == before


def test_a_replaced_file_is_refused(plan: LoadPlan):
    (path,) = plan.files
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        map_weights(plan)
