from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashtensors.checkpoint.architecture import SUPPORTED_MODEL_TYPES, read_model_config
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.checkpoint.tensor_names import tensor_shapes
from flashtensors.errors import ConfigError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
@pytest.mark.parametrize(("dtype", "num_shards"), [("float32", 1), ("bfloat16", 3), ("float16", 2)])
def test_transformers_loads_every_tensor(tmp_path: Path, model_type: str, dtype: str, num_shards: int) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config(model_type), dtype=dtype, num_shards=num_shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == num_shards
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert str(model.dtype) == f"torch.{dtype}"
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(tmp_path).tensors.items()}
    assert shapes == tensor_shapes(read_model_config(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    assert shapes.keys() == open_checkpoint(tmp_path / "saved").tensors.keys()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_overrides_with_biases_have_all_their_tensors(tmp_path: Path, model_type: str) -> None:
    config = tiny_config(model_type, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    write_tiny_checkpoint(tmp_path, config)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report


def test_the_seed_decides_the_weights_and_every_dtype_rounds_the_same_ones(tmp_path: Path) -> None:
    config = tiny_config("llama")
    folders = {
        name: write_tiny_checkpoint(tmp_path / name, config, **options)
        for name, options in {"a": {}, "b": {}, "other": {"seed": 1}, "half": {"dtype": "bfloat16"}}.items()
    }
    content = {name: (folder / "model.safetensors").read_bytes() for name, folder in folders.items()}
    assert content["a"] == content["b"]
    assert content["a"] != content["other"]
    whole, half = (AutoModelForCausalLM.from_pretrained(folders[name]).state_dict() for name in ("a", "half"))
    assert all(torch.equal(half[name], whole[name].to(torch.bfloat16)) for name in whole)


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_greedy_answers_are_not_one_token_over_and_over(tmp_path: Path, model_type: str) -> None:
    write_tiny_checkpoint(tmp_path, tiny_config(model_type, eos_token_id=None))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert len(set(answer[0].tolist())) > 8


def test_the_tokenizer_is_whole(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_tokenizer(tmp_path))
    assert len(tokenizer) == 300
    text = "hello and the\n\nÜnïcödé 👩‍🚀"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True).input_ids
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 2, 3)


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match="one of llama, mistral"):
        tiny_config("mamba")
