"""How many tokens a second does the engine generate from batch work on one GPU?

Models are published shapes with random weights, answers have the lengths that the workload says (`ignore_eos`),
temperature 0.6. Each run has an engine of its own, so that nothing is found in its prefix cache; graphs stay, as they
do in a server. The first run of a workload is a warm-up and has a row of its own. Beside tokens a second: steps, the
time that the engine's thread computed instead of waiting for the GPU, and captures, which must be 0 after warm-up.

    python benchmarks/engine/bench_throughput.py [--models qwen3-0.6b ...] [--workloads bench256 ...] [--runs 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from record import report, spread
from shapes import SHAPES, make_bench_runner, make_model
from workloads import WORKLOADS, Workload

from flashtensors.engine.loop import Engine
from flashtensors.request import BATCH_PRIORITY, EngineRequest, SamplingParams
from flashtensors.runner.device_runner import DeviceRunner
from flashtensors.step import RunnerLimits, StepPlan, StepResult


class TimedRunner:
    """A runner that notes how long its caller waits in `collect`, and works in `launch`."""

    def __init__(self, runner: DeviceRunner) -> None:
        self.runner = runner
        self.launch_s = self.collect_s = 0.0
        self.num_steps = 0

    @property
    def limits(self) -> RunnerLimits:
        """The runner's."""
        return self.runner.limits

    def launch(self, plan: StepPlan) -> None:
        """Start a step."""
        started_s = time.perf_counter()
        self.runner.launch(plan)
        self.launch_s += time.perf_counter() - started_s
        self.num_steps += 1

    def collect(self) -> StepResult:
        """Wait for a step."""
        started_s = time.perf_counter()
        result = self.runner.collect()
        self.collect_s += time.perf_counter() - started_s
        return result


def run(runner: DeviceRunner, workload: Workload, priority: int) -> dict[str, Any]:
    """Generate everything once."""
    runner.dock(runner.limits.num_blocks)
    timed, num_captures = TimedRunner(runner), runner.num_captures
    engine = Engine(timed, seeds=random.Random(0))
    num_tokens = 0
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for number, (prompt, max_tokens) in enumerate(workload):
        sampling = SamplingParams(temperature=0.6, max_tokens=max_tokens, ignore_eos=True)
        engine.add(
            EngineRequest(
                request_id=str(number),
                model="",
                prompt_token_ids=prompt,
                sampling=sampling,
                priority=priority,
                is_streamed=False,
            ),
            (),
        )
    while engine.has_work:
        num_tokens += sum(len(delta.token_ids) for delta in engine.step())
    seconds = time.perf_counter() - started_s
    assert num_tokens == sum(max_tokens for _, max_tokens in workload), f"{num_tokens} tokens came back"
    stats = engine.stats()
    return {
        "out_tok_s": num_tokens / seconds,
        "s": round(seconds, 3),
        "steps": timed.num_steps,
        "launch_us": round(timed.launch_s / timed.num_steps * 1e6, 1),
        "wait_us": round(timed.collect_s / timed.num_steps * 1e6, 1),
        "engine_us": round((seconds - timed.launch_s - timed.collect_s) / timed.num_steps * 1e6, 1),
        "captures": runner.num_captures - num_captures,
        "preemptions": stats.num_preemptions,
    }


def profiled(runner: DeviceRunner, workload: Workload, priority: int) -> dict[str, float]:
    """Milliseconds of a whole run by kernel, the longest first, and of the device doing nothing."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        seconds = run(runner, workload, priority)["s"]
    kernels = sorted(((event.device_time_total, event.key) for event in trace.key_averages()), reverse=True)
    ms = {name[:70]: round(us / 1e3, 1) for us, name in kernels[:24]}
    return {"all": seconds * 1e3, "busy": round(sum(us for us, _ in kernels) / 1e3, 1), **ms}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--interactive", action="store_true", help="as chats: served as they come, prompts at once")
    parser.add_argument("--eager", action="store_true", help="capture no graphs")
    parser.add_argument("--profile", action="store_true", help="one run more, under torch's profiler")
    parser.add_argument("--no-groups", action="store_true", help="read shared prefixes once for each sequence")
    parser.add_argument("--fp8-kv", action="store_true", help="a KV cache of float8_e4m3fn")
    arguments = parser.parse_args()
    kv_dtype = torch.float8_e4m3fn if arguments.fp8_kv else torch.bfloat16
    priority = 0 if arguments.interactive else BATCH_PRIORITY
    rows = []
    for name in arguments.models:
        runner = make_bench_runner(
            make_model(SHAPES[name]),
            SHAPES[name],
            enforce_eager=arguments.eager,
            has_groups=not arguments.no_groups,
            kv_dtype=kv_dtype,
        )
        for workload_name in arguments.workloads:
            workload = WORKLOADS[workload_name]()
            runs = [run(runner, workload, priority) for _ in range(arguments.runs + 1)]
            warm = runs[1:] or runs
            median = statistics.median_low([each["out_tok_s"] for each in warm])
            typical = next(each for each in warm if each["out_tok_s"] == median)
            rows.append(
                {
                    "model": name,
                    "workload": workload_name,
                    **typical,
                    "out_tok_s": spread([each["out_tok_s"] for each in warm]),
                    "first_run": {**runs[0], "out_tok_s": round(runs[0]["out_tok_s"], 1)},
                }
            )
            if arguments.profile:
                rows[-1]["kernel_ms"] = profiled(runner, workload, priority)
            print(rows[-1], flush=True)
        runner.close()
        del runner
        torch.cuda.empty_cache()
    name = "throughput-fp8-kv" if arguments.fp8_kv else "throughput"
    report(
        name,
        rows,
        temperature=0.6,
        priority=priority,
        max_num_seqs=1024,
        max_tokens_per_step=8192,
        kv_dtype=str(kv_dtype),
    )


if __name__ == "__main__":
    main()
