"""How fast does the engine generate on a CPU, against transformers `generate` in the same run?

Each row is one (dtype, batch): the same prompts, greedy, the same number of new tokens, end-of-sequence not allowed. Both
sides run with the same torch threads, interleaved, prompts processed inside the time. Before timing, the first fp32
batch must give the same tokens on both sides. `limit_tokens_per_s` is what this machine's memory allows: every step
reads every weight once, at the rate of a large read measured here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread

from flashtensors import LLM, SamplingParams
from flashtensors.checkpoint.catalog import Catalog

TOPICS = ("France", "rain", "a violin", "tax law", "bread", "the Moon", "chess", "a cold", "granite", "jazz", "bees")


def prompts(count: int) -> list[str]:
    return [f"Explain {TOPICS[i % len(TOPICS)]} to a child in {i + 3} sentences." for i in range(count)]


class Ours:
    """The engine in this process."""

    def __init__(self, model: str, dtype: str) -> None:
        self.llm = LLM(model, dtype=dtype, device="cpu", enable_prefix_caching=False, kv_cache_size=512 * 2**20)

    def generate(self, token_ids: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy continuations, `num_new` tokens each."""
        params = SamplingParams(temperature=0.0, max_tokens=num_new, min_tokens=num_new)
        return [out.outputs[0].token_ids for out in self.llm.generate(token_ids, params)]


class Transformers:
    """`AutoModelForCausalLM.generate` with left padding and its default attention."""

    def __init__(self, folder: str, dtype: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(self, token_ids: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy continuations, `num_new` tokens each."""
        longest = max(map(len, token_ids))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in token_ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in token_ids])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=num_new,
                max_new_tokens=num_new,
                pad_token_id=0,
            )
        return [row[longest:].tolist() for row in out]


def tokens_per_s(side: Ours | Transformers, token_ids: list[list[int]], num_new: int) -> float:
    started = time.perf_counter()
    side.generate(token_ids, num_new)
    return len(token_ids) * num_new / (time.perf_counter() - started)


def read_bytes_per_s() -> float:
    """Rate of reading 1 GiB of memory with torch's threads, the best of five."""
    block = torch.ones(2**28, dtype=torch.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        best = max(best, block.nbytes / (time.perf_counter() - started))
    return best


def measure(model: str, dtype: str, batches: list[int], num_new: int, num_runs: int) -> list[dict[str, object]]:
    ours = Ours(model, dtype)
    theirs = Transformers(Catalog(ours.llm.settings.store).get(model).folder, dtype)
    weight_bytes = sum(p.nbytes for p in theirs.model.parameters())
    read_rate = read_bytes_per_s()
    rows: list[dict[str, object]] = []
    for batch in batches:
        token_ids = [ours.llm.tokenizer.encode(prompt) for prompt in prompts(batch)]
        same = [
            a == b for a, b in zip(ours.generate(token_ids, num_new), theirs.generate(token_ids, num_new), strict=True)
        ]
        if dtype == "float32" and not all(same):
            raise SystemExit(f"float32 batch {batch}: {same.count(False)} of {batch} continuations differ")
        samples: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(num_runs):
            samples["ours"].append(tokens_per_s(ours, token_ids, num_new))
            samples["theirs"].append(tokens_per_s(theirs, token_ids, num_new))
        ours_spread, theirs_spread = spread(samples["ours"]), spread(samples["theirs"])
        rows.append(
            {
                "dtype": dtype,
                "batch": batch,
                "new_tokens": num_new,
                "tokens_per_s": ours_spread,
                "transformers_tokens_per_s": theirs_spread,
                "ratio": round(ours_spread["median"] / theirs_spread["median"], 2),
                "limit_tokens_per_s": round(batch * read_rate / weight_bytes, 1),
                "same_tokens": same.count(True),
            }
        )
        print(rows[-1], flush=True)
    ours.llm.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    rows = [
        row for dtype in args.dtypes for row in measure(args.model, dtype, args.batches, args.new_tokens, args.runs)
    ]
    report("cpu", rows, model=args.model, torch_threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
