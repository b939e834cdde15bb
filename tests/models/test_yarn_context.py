"""A model whose context YaRN stretches, from its folder to its answer: every limit is the stretched one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.errors import ConfigError, ContextTooLong
from flashtensors.llm import LLM
from flashtensors.request import SamplingParams
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

PROMPT = [(7 * index * index + 3 * index + 11) % 290 + 4 for index in range(150)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)


@pytest.fixture(params=["qwen2", "qwen3"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = tiny_config(request.param, dtype="float32", max_position_embeddings=64, rope_scaling=scaling)
    write_tiny_checkpoint(tmp_path / "model", config)
    return write_tiny_tokenizer(tmp_path / "model")


def test_text_beyond_the_original_context_is_that_of_transformers(folder: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = oracle.generate(
        torch.tensor([PROMPT]), max_new_tokens=80, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    with LLM(folder, device="cpu", max_num_seqs=2) as llm:
        assert list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == expected
        with pytest.raises(ContextTooLong, match="the model's context is 256 tokens"):
            llm.generate([PROMPT * 2], GREEDY)
    assert len(set(expected)) > 10


def test_the_catalog_and_the_bound_on_settings_know_the_stretched_context(folder: Path, tmp_path: Path) -> None:
    assert pull(Catalog(tmp_path / "store"), str(folder)).max_position_embeddings == 256
    with pytest.raises(ConfigError, match="trained for at most 256 tokens"):
        LLM(folder, device="cpu", max_model_len=257)
