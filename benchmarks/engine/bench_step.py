"""Where does the time of a decode step go, and how far is it from the device's limits?

256 sequences of 100 to 1,600 tokens decode with nothing else going on. `step_ms` is the time of a step with two in
flight, `launch_us` what launching one costs the host, `replay_us` the driver's part of that (the launch of one graph),
and `host_us` all that it does for one, under the engine and without waiting. Floors are measured in the same run: all
matrix products of the step in a graph of cuBLAS calls, and the bytes of keys and values at the rate of a large copy.
The breakdown sums kernels of one step by what they do, from torch's profiler: kernels that start before the one in
front has ended count what they wait, so the sum may exceed the step. `largest_gap_us` is the longest time between two
kernels in several steps.

    python benchmarks/engine/bench_step.py [--models qwen3-0.6b ...] [--seqs 256 ...] [--fp8-weights]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

os.environ.setdefault("TEARDOWN_CUPTI", "1")  # what profiled one row stays attached else: 100 us more for each launch
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parent))
from record import report, spread
from shapes import DEVICE, DTYPE, SHAPES, make_bench_runner, make_model, with_fp8_weights
from timing import copy_bytes_per_us, replayed_us

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.engine.loop import Engine
from flashtensors.models.registry import weight_layout
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.runner.graph_runner import GraphRunner
from flashtensors.step import SlotStart, StepPlan, StepResult, int_rows

KINDS = {
    "attention": ("attend", "merge_splits", "make_items", "arrange_groups"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "splitKreduce", "_multiply", "multiply_few_rows"),
    "beside products": ("round_rows", "add_splits"),
    "norm": ("norm_rows",),
    "rope and append": ("rope_append",),
    "activation": ("gated_product",),
    "sampling": ("choose", "block_stats", "histogram"),
    "step": ("expand_spans", "append_blocks", "note_drawn", "embed", "Memcpy"),
}


class Decoding:
    """Sequences that decode, one token a step."""

    def __init__(self, runner: GraphRunner, lengths: list[int]) -> None:
        self.runner = runner
        self.lengths = np.array(lengths, dtype=np.int32)
        self.block_size = runner.limits.block_size
        needed = sum(-(-length // self.block_size) + 8 for length in lengths)
        self.free_blocks = random.Random(1).sample(range(needed), needed)
        self.num_steps = 0
        for layer in runner.kv_caches:
            for cache in layer:
                cache.normal_()

    def plan(self) -> StepPlan:
        """The next step; the first starts all sequences."""
        starts: list[SlotStart] = []
        appends: list[tuple[int, int, int]] = []
        if self.num_steps == 0:
            for slot, length in enumerate(self.lengths.tolist()):
                sampling = SamplingParams(temperature=0.6, max_tokens=None, ignore_eos=True)
                tokens = [7] * length
                starts.append(
                    SlotStart(
                        slot=slot,
                        token_ids=tokens,
                        num_prompt_tokens=length,
                        sampling=sampling,
                        seed=slot,
                        stop_token_ids=[],
                    )
                )
                appends += [(slot, index, self._take()) for index in range(-(-length // self.block_size))]
        else:
            for slot in np.flatnonzero(self.lengths % self.block_size == 0).tolist():
                appends.append((slot, int(self.lengths[slot]) // self.block_size, self._take()))
            self.lengths = self.lengths + 1
        slots = np.arange(len(self.lengths), dtype=np.int32)
        spans = np.stack((slots, self.lengths - 1, np.ones_like(slots), np.ones_like(slots)), axis=1)
        self.num_steps += 1
        return StepPlan(
            step=self.num_steps - 1,
            starts=starts,
            block_appends=int_rows(appends, 3),
            spans=spans,
            is_steady=self.num_steps > 2,
        )

    def _take(self) -> int:
        return self.free_blocks.pop()

    def run(self, num_steps: int) -> tuple[float, list[float]]:
        """Milliseconds of a step, and the host's microseconds for launching each."""
        host_us: list[float] = []
        plans = [self.plan() for _ in range(num_steps)]
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        self.runner.launch(plans[0])
        for plan in plans[1:]:
            begin_s = time.perf_counter()
            self.runner.launch(plan)
            launched_s = time.perf_counter()
            self.runner.collect()
            host_us.append((launched_s - begin_s) * 1e6)
        self.runner.collect()
        return (time.perf_counter() - started_s) / num_steps * 1e3, host_us


@contextlib.contextmanager
def watch_replays() -> Iterator[list[float]]:
    """Microseconds of each launch of a graph."""
    found: list[float] = []
    replay = torch.cuda.CUDAGraph.replay

    def timed(graph: torch.cuda.CUDAGraph) -> None:
        begin_s = time.perf_counter()
        replay(graph)
        found.append((time.perf_counter() - begin_s) * 1e6)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", timed):
        yield found


class WaitingRunner:
    """A runner that counts the seconds in which its host has nothing to do but wait."""

    def __init__(self, runner: GraphRunner) -> None:
        self.limits = runner.limits
        self.waited_s = 0.0
        self._runner = runner

    def launch(self, plan: StepPlan) -> None:
        """Start a step."""
        self._runner.launch(plan)

    def collect(self) -> StepResult:
        """The oldest step, waited for first."""
        begin_s = time.perf_counter()
        arrival = self._runner._arrivals[self._runner._in_flight[0].buffer]
        assert arrival is not None, "a runner without a device"
        arrival.synchronize()
        self.waited_s += time.perf_counter() - begin_s
        return self._runner.collect()


def engine_us(runner: GraphRunner, num_seqs: int, num_steps: int = 200) -> list[float]:
    """Microseconds of the host in each step of an engine whose sequences all decode, and stay the same."""
    waiting, source = WaitingRunner(runner), random.Random(2)
    engine = Engine(waiting)
    sampling = SamplingParams(temperature=0.6, max_tokens=num_steps + 60, ignore_eos=True)
    for number in range(num_seqs):
        prompt = source.choices(range(1000), k=source.randint(64, 127))
        request = EngineRequest(
            request_id=str(number), model="m", prompt_token_ids=prompt, sampling=sampling, is_streamed=False
        )
        engine.add(request, ())
    while engine.stats().num_running < num_seqs:
        engine.step()
    host_us: list[float] = []
    for _ in range(num_steps + 40):
        begin_s, waited_s = time.perf_counter(), waiting.waited_s
        engine.step()
        host_us.append((time.perf_counter() - begin_s - waiting.waited_s + waited_s) * 1e6)
    for number in range(num_seqs):
        engine.abort(str(number))
    engine.drain()
    return host_us[40:]


def breakdown(decoding: Decoding, num_steps: int = 6) -> dict[str, Any]:
    """Kernels of a step by kind, in microseconds, and the gaps between them."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        decoding.run(num_steps)
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    us: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for begin, end, name in spans:
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None)
        us[kind or "other"] += (end - begin) / num_steps
        if kind is None:
            other[name[:60]] += (end - begin) / num_steps
    middle = spans[len(spans) // num_steps : -len(spans) // num_steps]
    gaps = [max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(middle)]
    return {
        "us_by_kind": {kind: round(value, 1) for kind, value in us.most_common()},
        "other": {name: round(value, 1) for name, value in other.most_common(8)},
        "idle_us": round(sum(gaps) / max(1, num_steps - 2), 1),
        "largest_gap_us": round(max(gaps, default=0.0), 1),
        "kernels": len(spans) // num_steps,
    }


def products_ms(config: ModelConfig, num_rows: int) -> float:
    """All matrix products of a step, by cuBLAS in a graph."""
    weights = [
        torch.empty(weight.shape, device=DEVICE, dtype=DTYPE).normal_(0, 0.02)
        for weight in weight_layout(config).weights
        if len(weight.shape) == 2 and weight.name != "embedding.weight"
    ]
    head = torch.empty((config.vocab_size, config.hidden_size), device=DEVICE, dtype=DTYPE).normal_(0, 0.02)
    weights = [weight for weight in weights if weight.shape[0] != config.vocab_size] + [head]
    inputs = {weight.shape[1]: torch.randn(num_rows, weight.shape[1], device=DEVICE, dtype=DTYPE) for weight in weights}

    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return spread(replayed_us([products], num_runs=10))["median"] / 1e3


def measure(name: str, num_seqs: int, copy_rate: float, *, has_fp8_weights: bool) -> dict[str, Any]:
    """One row."""
    config, source = SHAPES[name], random.Random(0)
    lengths = [source.randint(100, 1600) for _ in range(num_seqs)]
    floor_ms = {"products": round(products_ms(config, num_seqs), 3)}  # before the cache takes all memory
    torch.cuda.empty_cache()
    if has_fp8_weights:
        config = with_fp8_weights(config)
    layout = weight_layout(config).weights
    weight_bytes = sum(weight.num_elements * getattr(torch, weight.dtype or "bfloat16").itemsize for weight in layout)
    runner = make_bench_runner(make_model(config), config, max_num_seqs=max(num_seqs, 256))
    assert isinstance(runner, GraphRunner)
    decoding = Decoding(runner, lengths)
    decoding.run(8)
    num_captures = runner.num_captures
    with watch_replays() as replay_us:
        runs = [decoding.run(60) for _ in range(3)]
    assert runner.num_captures == num_captures, "a warm runner captured"
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * DTYPE.itemsize
    floor_ms["keys and values"] = round(int(decoding.lengths.sum()) * token_bytes / copy_rate / 1e3, 3)
    step_ms = spread([ms for ms, _ in runs])
    row = {
        "model": name,
        "weights": "fp8" if has_fp8_weights else "bfloat16",
        "weight_gb": round(weight_bytes / 1e9, 2),
        "seqs": num_seqs,
        "context": int(decoding.lengths.mean()),
        "step_ms": step_ms,
        "tok_s": round(num_seqs / step_ms["median"] * 1e3),
        "launch_us": spread([us for _, host_us in runs for us in host_us]),
        "replay_us": spread(replay_us),
        "host_us": spread(engine_us(runner, num_seqs)),
        "floor_ms": floor_ms,
        **breakdown(decoding),
    }
    runner.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--seqs", nargs="+", type=int, default=[256])
    parser.add_argument("--fp8-weights", action="store_true", help="beside bf16 weights, also fp8 ones")
    arguments = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    rows = []
    weights = (False, True) if arguments.fp8_weights else (False,)
    for name, num_seqs, has_fp8_weights in itertools.product(arguments.models, arguments.seqs, weights):
        rows.append(measure(name, num_seqs, copy_rate, has_fp8_weights=has_fp8_weights))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    report(
        "step-fp8" if arguments.fp8_weights else "step", rows, copy_tb_per_s=round(copy_rate / 1e6, 3), dtype="bfloat16"
    )


if __name__ == "__main__":
    main()
