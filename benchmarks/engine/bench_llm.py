"""How many tokens a second does `LLM.generate` make of batch work, beside the engine alone?

A model of a published shape is written to disk and loaded by the public class. Its prompts come as token ids, and as
text that has these ids; in both cases answers are turned into text, and the clock runs from the call to the list of
answers. Each run has other tokens of the same lengths, so that nothing is found in the prefix cache but what a
workload shares. Only runs that compiled no kernel and captured at most two graphs count: how requests meet steps
differs from run to run, and so does now and then the size of a step. Last, the same requests on an engine without
tokeniser, worker and threads.

    python benchmarks/engine/bench_llm.py [--models qwen3-0.6b ...] [--workloads bench256 ...] [--runs 3]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from bench_throughput import measure
from record import report, spread
from shapes import DEVICE, SHAPES, make_bench_runner, make_model
from warm_runs import NewWork, Row, warm_runs
from word_tokenizer import write_tokenizer
from workloads import WORKLOADS, Workload

from benchmarks.transfer.checkpoints import CONFIGS, write_model
from flashtensors import LLM, SamplingParams
from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.request import BATCH_PRIORITY

MAX_NUM_SEQS = 1024
MAX_MODEL_LEN = 4096
COMPILE_TIMEOUT_S = 400.0
MOST_CAPTURES = 2
_WORD_IDS = range(2, 10_001)
"""What the tokens of all workloads are of."""


def shifted(workload: Workload, number: int) -> Workload:
    """The workload with other tokens: of the same lengths, sharing as much as before."""
    first, count = _WORD_IDS.start, len(_WORD_IDS)
    return [
        ([first + (token_id - first + 97 * number) % count for token_id in prompt], max_tokens)
        for prompt, max_tokens in workload
    ]


def generate(llm: LLM, workload: Workload, *, as_text: bool) -> Row:
    """Generate everything once."""
    prompts = [llm.tokenizer.decode(prompt) if as_text else prompt for prompt, _ in workload]
    params = [SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True) for _, max_tokens in workload]
    started_s = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - started_s
    for (prompt, max_tokens), output in zip(workload, outputs, strict=True):
        assert output.prompt_token_ids == prompt, "a text has other ids than it was made of"
        assert len(output.outputs[0].token_ids) == max_tokens, f"{len(output.outputs[0].token_ids)} tokens came back"
    num_tokens = sum(max_tokens for _, max_tokens in workload)
    num_characters = sum(len(output.outputs[0].text) for output in outputs)
    return {"out_tok_s": num_tokens / seconds, "s": round(seconds, 3), "characters": num_characters}


def wait_for_compilers() -> float:
    """Wait until the processes that the worker started have ended: they compile on the device. Returns seconds."""
    started_s = time.perf_counter()
    while any(_children()):
        if time.perf_counter() - started_s > COMPILE_TIMEOUT_S:
            raise RuntimeError(f"kernels are still being compiled after {COMPILE_TIMEOUT_S:.0f} s")
        time.sleep(0.2)
    return time.perf_counter() - started_s


def _children() -> Iterator[str]:
    """Processes of this one that run."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if int(parent) == os.getpid() and state != "Z":
            yield path.parent.name


def summary(warm_ups: list[Row], warm: list[Row]) -> Row:
    return {
        **warm[0],
        "s": spread([each["s"] for each in warm]),
        "out_tok_s": spread([each["out_tok_s"] for each in warm]),
        "captures": [each["captures"] for each in warm],
        "warm_ups": [{**each, "out_tok_s": round(each["out_tok_s"], 1)} for each in warm_ups],
    }


def through_llm(shape: str, workloads: list[str], num_runs: int, device: torch.device) -> list[Row]:
    """Rows of token ids and of text, through the public class; `shape` is one of `CONFIGS`."""
    rows, numbers = [], itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        write_model(shape, checkpoint)
        write_tokenizer(checkpoint, CONFIGS[shape]["vocab_size"])
        with LLM(
            checkpoint,
            device=device.type,
            storage_path=str(Path(folder) / "store"),
            max_num_seqs=MAX_NUM_SEQS,
            max_model_len=MAX_MODEL_LEN,
            gpu_memory_utilization=0.9,
        ) as llm:
            print(f"kernels were compiled {wait_for_compilers():.1f} s after the load", flush=True)
            for workload_name, as_text in itertools.product(workloads, (False, True)):
                workload = WORKLOADS[workload_name]()

                def run(_: NewWork, workload: Workload = workload, as_text: bool = as_text) -> Row:
                    return generate(llm, shifted(workload, next(numbers)), as_text=as_text)

                through = "LLM.generate of text" if as_text else "LLM.generate of ids"
                measured = summary(*warm_runs(run, num_runs, are_alike=False, most_captures=MOST_CAPTURES))
                rows.append({"workload": workload_name, "through": through, **measured})
                print(rows[-1], flush=True)
    return rows


def through_engine(config: ModelConfig, workloads: list[str], num_runs: int) -> list[Row]:
    """Rows of the engine alone."""
    rows = []
    with make_bench_runner(
        make_model(config), config, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN
    ) as runner:
        for workload_name in workloads:
            measured = measure(runner, WORKLOADS[workload_name](), BATCH_PRIORITY, num_runs)
            rows.append({"workload": workload_name, "through": "engine", **measured})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["qwen3-0.6b", "llama-3.2-1b"], choices=list(SHAPES))
    parser.add_argument("--workloads", nargs="+", default=["bench256"], choices=list(WORKLOADS))
    parser.add_argument("--runs", type=int, default=3, help="warm runs of each row")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for name in arguments.models:
        parts: list[Callable[[], list[Row]]] = [
            lambda name=name: through_llm(name, arguments.workloads, arguments.runs, DEVICE),
            lambda name=name: through_engine(SHAPES[name], arguments.workloads, arguments.runs),
        ]
        for part in parts:
            rows += [{"model": name, **row} for row in part()]
            gc.collect()
            torch.cuda.empty_cache()
    report("llm", rows, temperature=0.6, max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN, dtype="bfloat16")


if __name__ == "__main__":
    main()
