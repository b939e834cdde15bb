"""Models with projections in fp8: the same as the unquantised model with the weights that the bytes stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtensors.checkpoint.architecture import ModelConfig, read_model_config
from flashtensors.checkpoint.config_fp8 import Fp8Config
from flashtensors.checkpoint.quantize import quantize_checkpoint
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.errors import CheckpointError, UnsupportedModel
from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.memory.arena import Arena
from flashtensors.models.registry import build_model, weight_layout
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer.load_plan import make_load_plan
from flashtensors.transfer.pipeline import load

from .transformers_oracle import PagedModel

TOKENS = [5, 9, 200, 33, 7, 7, 120]
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def write_blockwise(folder: Path, out_folder: Path) -> Path:
    """The model in the scheme of DeepSeek's and Qwen's checkpoints."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        scale = torch.rand(rows, columns) + 0.5
        tensors[name] = (tensor.float() * 100).to(FP8_DTYPE)
        tensors[f"{name}_scale_inv"] = (scale / 100).to(torch.bfloat16)
    out_folder.mkdir()
    save_file(tensors, out_folder / "model.safetensors")
    scheme = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((folder / "config.json").read_text())
    (out_folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    return out_folder


def write_by_rows(folder: Path, out_folder: Path) -> Path:
    quantize_checkpoint(folder, out_folder)
    return out_folder


def load_weights(folder: Path, dtype: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = read_model_config(folder)
    plan = make_load_plan(weight_layout(config), open_checkpoint(folder), dtype)
    with Arena.allocate(plan.num_bytes) as arena:
        load(plan, arena)
        return config, {name: tensor.clone() for name, tensor in plan.tensors(arena).items()}


def widened(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors as fp32, scale by scale, without any of our layout."""
    tensors = load_file(folder / "model.safetensors")
    for scale_name in [name for name in tensors if "_scale" in name]:
        scale, name = tensors.pop(scale_name).float(), scale_name.partition("_scale")[0]
        rows, columns = tensors[name].shape
        if scale_name.endswith("_inv"):
            scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        tensors[name] = tensors[name].float() * scale
    return {name: tensor.float() for name, tensor in tensors.items()}


def logits(config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    return PagedModel(build_model(config, weights, dtype=dtype), config, dtype=dtype).step({0: TOKENS})


@pytest.mark.parametrize("write", [write_by_rows, write_blockwise])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_model_computes_with_what_its_bytes_stand_for(
    tmp_path: Path, model_type: str, write: Callable[[Path, Path], Path]
) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config(model_type, **SIZES), dtype="bfloat16")
    config, weights = load_weights(write(plain, tmp_path / "fp8"), "float32")
    assert weights["layers.0.attention.qkv.weight"].dtype == FP8_DTYPE
    assert weights["layers.0.attention.qkv.scale"].dtype == torch.float32
    (tmp_path / "wide").mkdir()
    save_file(widened(tmp_path / "fp8"), tmp_path / "wide" / "model.safetensors")
    (tmp_path / "wide" / "config.json").write_bytes((plain / "config.json").read_bytes())
    expected = logits(*load_weights(tmp_path / "wide", "float32"))
    torch.testing.assert_close(logits(config, weights), expected, rtol=1e-4, atol=1e-4)


def test_fp8_is_near_the_unquantised_model(tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config("llama", **SIZES), dtype="bfloat16")
    expected = logits(*load_weights(plain, "float32"))
    found = logits(*load_weights(write_by_rows(plain, tmp_path / "fp8"), "float32"))
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.1


def test_only_projections_have_scales_in_the_layout(tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config("qwen3", **SIZES), dtype="bfloat16")
    layout = weight_layout(read_model_config(write_by_rows(plain, tmp_path / "fp8")))
    scales = {weight.name for weight in layout.weights if weight.layer == 0 and weight.dtype == "float32"}
    products = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    assert scales == {f"layers.0.{name}.scale" for name in products}
    kept = {weight.name for weight in layout.weights if weight.dtype is None}
    assert {"embedding.weight", "head.weight", "layers.0.attention.q_norm.weight"} <= kept


def with_quantization(folder: Path, **changes: object) -> ModelConfig:
    quantization = msgspec.structs.replace(Fp8Config(is_blockwise=False, scale_name="weight_scale"), **changes)
    return msgspec.structs.replace(read_model_config(folder), quantization=quantization)


def test_parts_of_one_product_must_be_stored_alike(tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config("llama"))
    with pytest.raises(UnsupportedModel, match=r"k_proj.*some are quantised and some are not"):
        weight_layout(with_quantization(plain, kept=("*.k_proj",)))
    layout = weight_layout(with_quantization(plain, kept=("*.layers.0.*",)))
    assert {weight.layer for weight in layout.weights if weight.dtype is not None} == {1}


def test_blocks_must_not_be_shared_by_parts_of_one_product(tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config("llama"))
    with pytest.raises(UnsupportedModel, match=r"q_proj.*64, 32, 32 rows.*multiple of 128"):
        weight_layout(with_quantization(plain, is_blockwise=True))


def test_weights_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config("llama"))
    fp8 = write_by_rows(plain, tmp_path / "fp8")
    tensors = load_file(fp8 / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, fp8 / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is BF16, but the quantization_config"):
        make_load_plan(weight_layout(read_model_config(fp8)), open_checkpoint(fp8), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("write", [write_by_rows, write_blockwise])
def test_a_model_on_a_gpu_is_near_the_reference(tmp_path: Path, write: Callable[[Path, Path], Path]) -> None:
    plain = write_tiny_checkpoint(tmp_path / "plain", tiny_config("llama", **SIZES), dtype="bfloat16")
    config, weights = load_weights(write(plain, tmp_path / "fp8"), "bfloat16")
    expected = logits(config, weights, torch.bfloat16).float()
    on_gpu = {name: tensor.cuda() for name, tensor in weights.items()}
    model = build_model(config, on_gpu, dtype=torch.bfloat16)
    paged = PagedModel(model, config, dtype=torch.bfloat16, device="cuda", is_fused=True)
    found = paged.step({0: TOKENS}).float().cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.1
