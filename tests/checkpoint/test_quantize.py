"""Conversion to fp8: against torch's rounding, and what stays as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashtensors.checkpoint.architecture import read_model_config
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.fp8_values import round_to_e4m3
from flashtensors.checkpoint.pull import pull
from flashtensors.checkpoint.quantize import quantize_checkpoint
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.errors import CheckpointError, ConfigError, StoreError, UnsupportedModel
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


def write_model(folder: Path, model_type: str = "llama", *, dtype: str = "bfloat16", num_shards: int = 1) -> Path:
    write_tiny_checkpoint(folder, tiny_config(model_type), dtype=dtype, num_shards=num_shards)
    return write_tiny_tokenizer(folder)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_values_are_rounded_as_torch_rounds_them() -> None:
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    edges = np.array([0.0, -0.0, 2**-10, *np.arange(-464, 464, 0.25)], np.float32)
    bits = np.concatenate((random, edges))
    values = bits[np.abs(bits) <= 464]
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(round_to_e4m3(values), expected)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_projections_become_fp8_and_the_rest_stays(tmp_path: Path, dtype: str, num_shards: int) -> None:
    model = write_model(tmp_path / "model", dtype=dtype, num_shards=num_shards)
    reports: list[tuple[int, int]] = []
    quantize_checkpoint(model, tmp_path / "fp8", lambda *num_bytes: reports.append(num_bytes))
    before, after = read_tensors(model), read_tensors(tmp_path / "fp8")
    for name, tensor in before.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(after.pop(name), tensor)
            continue
        values, scale = after.pop(name), after.pop(f"{name}_scale")
        expected_scale = tensor.float().abs().amax(1, keepdim=True) / 448
        assert torch.equal(scale, expected_scale)
        assert torch.equal(values.view(torch.uint8), (tensor.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8))
    assert not after
    assert reports[-1] == (open_checkpoint(model).num_bytes,) * 2
    assert read_model_config(tmp_path / "fp8").quantization is not None
    assert (tmp_path / "fp8" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert {path.name for path in (tmp_path / "fp8").iterdir()} == {path.name for path in model.iterdir()}


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][3] = 0.0
    save_file(tensors, model / "model.safetensors")
    quantize_checkpoint(model, tmp_path / "fp8")
    after = read_tensors(tmp_path / "fp8")
    assert (after[name][3].float() == 0).all()
    assert 0 < after[f"{name}_scale"][3] < 1e-30


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    model = write_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 1] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight' has values that are infinite"):
        quantize_checkpoint(model, tmp_path / "fp8")


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    quantize_checkpoint(model, tmp_path / "fp8")
    with pytest.raises(UnsupportedModel, match="fp8 already"):
        quantize_checkpoint(tmp_path / "fp8", tmp_path / "again")
    with pytest.raises(UnsupportedModel, match="experts in fp8"):
        quantize_checkpoint(write_model(tmp_path / "experts", "mixtral"), tmp_path / "fp8-experts")


def test_a_pull_keeps_a_quantised_copy_beside_the_model(tmp_path: Path) -> None:
    catalog, model = Catalog(tmp_path / "store"), write_model(tmp_path / "tiny")
    copy = pull(catalog, str(model), quantization="fp8")
    assert (copy.name, copy.source, copy.quantization, copy.is_quantized_copy) == ("tiny:fp8", str(model), "fp8", True)
    assert catalog.find("tiny") is None
    assert catalog.find(str(model)) is None
    plain = pull(catalog, str(model))
    assert (plain.name, plain.quantization, plain.folder) == ("tiny", None, str(model))
    assert catalog.find(str(model)) == plain
    assert copy.num_parameters == plain.num_parameters
    assert pull(catalog, str(model), quantization="fp8") == copy
    assert catalog.verify("tiny:fp8").is_ok
    with pytest.raises(StoreError, match="tiny is the name of a model from"):
        pull(catalog, str(model), name="tiny", quantization="fp8")


def test_a_pull_of_an_fp8_model_says_so(tmp_path: Path) -> None:
    quantize_checkpoint(write_model(tmp_path / "tiny"), tmp_path / "small")
    record = pull(Catalog(tmp_path / "store"), str(tmp_path / "small"))
    assert (record.name, record.dtype, record.quantization) == ("small", "bfloat16", "fp8")
    assert not record.is_quantized_copy


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization is 'int3', but it must be fp8 or unset"):
        pull(Catalog(tmp_path / "store"), str(tmp_path), quantization="int3")


def test_the_configuration_is_one_that_others_read(tmp_path: Path) -> None:
    quantize_checkpoint(write_model(tmp_path / "tiny"), tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (scheme["weights"]["strategy"], scheme["input_activations"]["dynamic"]) == ("channel", True)
