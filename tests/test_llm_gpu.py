"""The whole way on a GPU: a checkpoint of a real model's shape, loaded and generated from, against transformers."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from flashtensors import LLM, SamplingParams
from flashtensors.request import RequestOutput
from flashtensors.testing.checkpoints import write_tiny_checkpoint, write_tiny_tokenizer

pytestmark = pytest.mark.gpu

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
PROMPTS = [[17, 4, 99, 1203], list(range(100, 400)), [5] * 33, [151935, 7, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=64, min_tokens=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-0.6b")
    write_tiny_checkpoint(folder, QWEN3_0_6B, dtype="bfloat16", num_shards=2)
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """Greedy answers to `PROMPTS` in float32, by transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).cuda().eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        length = {"min_new_tokens": 64, "max_new_tokens": 64}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
        answers.append(out[0, len(prompt) :].tolist())
    del model
    torch.cuda.empty_cache()
    return answers


def token_ids(outputs: Iterable[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_equal_transformers_in_fp32(checkpoint: Path, expected: list[list[int]]) -> None:
    with LLM(checkpoint, dtype="float32", device="cuda", max_model_len=2048, gpu_memory_utilization=0.3) as llm:
        together = token_ids(llm.generate(PROMPTS, GREEDY))
        alone = [token_ids(llm.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    assert together == expected
    assert alone == expected


def test_neither_waiting_for_blocks_nor_eager_steps_change_tokens(checkpoint: Path, expected: list[list[int]]) -> None:
    few = {"max_model_len": 512, "kv_cache_size": "192MiB"}  # 8 blocks, and these answers take 36
    with LLM(checkpoint, dtype="float32", device="cuda", enforce_eager=True, enable_prefix_caching=False, **few) as llm:
        outputs = llm.generate_each(PROMPTS * 3, GREEDY)
        first = next(outputs)
        chat = list(llm.stream(PROMPTS[1], GREEDY))[-1]  # more urgent than those that still run
        assert token_ids([first, *outputs]) == expected * 3
    assert token_ids([chat]) == expected[1:2]
