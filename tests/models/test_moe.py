"""What is peculiar to mixtures of experts: rows of the last layer, stacked weights, and plans of real sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.architecture import parse_config, read_model_config
from flashtensors.checkpoint.safetensors import Checkpoint, open_checkpoint
from flashtensors.checkpoint.safetensors_header import TensorEntry
from flashtensors.checkpoint.tensor_names import tensor_shapes
from flashtensors.memory.arena import Arena
from flashtensors.models.registry import weight_layout
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer.load_plan import make_load_plan
from flashtensors.transfer.pipeline import load

from .test_models import random_tokens
from .tiny_configs import SMALL, SPARSE
from .transformers_oracle import make_oracle, make_paged


@torch.inference_mode()
def test_a_step_without_sampled_rows_computes_no_expert_of_the_last_layer() -> None:
    oracle, tokens = make_oracle(SPARSE["mixtral"]), random_tokens(30)
    paged = make_paged(oracle)
    assert paged.step({0: tokens[:29]}, sample_rows=[]).shape == (0, SMALL["vocab_size"])
    expected = oracle(torch.tensor([tokens])).logits[0, -1:]
    torch.testing.assert_close(paged.step({0: tokens[29:]}), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_are_stacked_where_a_file_is_loaded(tmp_path: Path, model_type: str) -> None:
    folder = write_tiny_checkpoint(tmp_path, tiny_config(model_type), num_shards=3)
    config, checkpoint = read_model_config(folder), open_checkpoint(folder)
    plan = make_load_plan(weight_layout(config), checkpoint, "float32")
    arena = Arena.allocate(plan.num_bytes, device="cpu")
    load(plan, arena)
    assert config.experts is not None
    gate_up = plan.tensors(arena)["layers.1.mlp.experts.gate_up.weight"].unflatten(0, (config.experts.num_experts, -1))
    block, names = ("mlp", "gate_proj up_proj") if model_type == "qwen3_moe" else ("block_sparse_moe", "w1 w3")
    for expert, weight in enumerate(gate_up):
        for name, part in zip(names.split(), weight.chunk(2), strict=True):
            entry = checkpoint.tensors[f"model.layers.1.{block}.experts.{expert}.{name}.weight"]
            with entry.path.open("rb") as file:
                file.seek(entry.offset)
                assert file.read(entry.num_bytes) == part.contiguous().numpy().tobytes()


def test_a_plan_for_nineteen_thousand_tensors_is_made_from_headers_alone(tmp_path: Path) -> None:
    config = parse_config(
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "norm_topk_prob": True,
            "dtype": "bfloat16",
        },
        None,
        where="Qwen3-30B-A3B",
    )
    path = tmp_path / "model.safetensors"
    path.touch()
    tensors, offset = {}, 0
    for name, shape in tensor_shapes(config).items():
        num_bytes = 2 * int(torch.Size(shape).numel())
        tensors[name] = TensorEntry(name=name, dtype="BF16", shape=shape, path=path, offset=offset, num_bytes=num_bytes)
        offset += num_bytes
    assert len(tensors) == 18_867
    assert 30.4e9 < offset / 2 < 30.6e9
    plan = make_load_plan(weight_layout(config), Checkpoint(tensors=tensors, num_bytes=offset), "bfloat16")
    assert len(plan.extents) == 18_867
    assert len(plan.planned_tensors) == 2 + 48 * 9 + 1
    assert plan.file_bytes == offset
