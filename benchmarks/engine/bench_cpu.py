"""How fast does the engine generate on a CPU, against transformers `generate` in the same run?

Each row is one (dtype, batch): the same prompts, greedy, the same number of new tokens, end-of-sequence not allowed,
prompts processed inside the time. Each side lives in a process of its own, as users run it (two pools of OpenMP
threads in one process slow both down), with the same number of threads; runs alternate, the other side sleeps
meanwhile. Before timing, fp32 must give the same tokens on both sides. `limit_tokens_per_s` is what this machine's
memory allows: every step reads every weight once, at the rate of a large read measured here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread

from flashtensors import LLM, SamplingParams
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.config import load_settings
from flashtensors.text.tokenizer import Tokenizer

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


class Side:
    """One contestant in a process of its own."""

    def __init__(self, kind: type[Ours] | type[Transformers], *arguments: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
        self._process.start()
        self._pipe.recv()

    def generate(self, token_ids: list[list[int]], num_new: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the continuations."""
        self._pipe.send((token_ids, num_new))
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def _serve(pipe, kind, arguments) -> None:
    side = kind(*arguments)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        started = time.perf_counter()
        answer = side.generate(*task)
        pipe.send((time.perf_counter() - started, answer))


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
    record = Catalog(load_settings().store).get(model)
    tokenizer = Tokenizer.from_folder(Path(record.folder))
    weight_bytes = record.num_parameters * (2 if dtype == "bfloat16" else 4)
    ours, theirs = Side(Ours, model, dtype), Side(Transformers, record.folder, dtype)
    rows: list[dict[str, object]] = []
    for batch in batches:
        token_ids = [tokenizer.encode(prompt) for prompt in prompts(batch)]
        answers = [side.generate(token_ids, num_new)[1] for side in (ours, theirs)]
        same = [a == b for a, b in zip(*answers, strict=True)]
        if dtype == "float32" and not all(same):
            raise SystemExit(f"float32 batch {batch}: {same.count(False)} of {batch} continuations differ")
        samples: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(num_runs):
            for name, side in (("ours", ours), ("theirs", theirs)):
                samples[name].append(batch * num_new / side.generate(token_ids, num_new)[0])
        ours_spread, theirs_spread = spread(samples["ours"]), spread(samples["theirs"])
        rows.append(
            {
                "dtype": dtype,
                "batch": batch,
                "new_tokens": num_new,
                "tokens_per_s": ours_spread,
                "transformers_tokens_per_s": theirs_spread,
                "ratio": round(ours_spread["median"] / theirs_spread["median"], 2),
                "limit_tokens_per_s": round(batch * read_bytes_per_s() / weight_bytes, 1),
                "same_tokens": same.count(True),
            }
        )
        print(rows[-1], flush=True)
    ours.close()
    theirs.close()
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
