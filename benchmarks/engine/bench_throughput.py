"""How many tokens a second does the engine generate from batch work on one GPU?

Models are published shapes with random weights, answers have the lengths that the workload says (`ignore_eos`),
temperature 0.6. Each run has an engine of its own, so that nothing is found in its prefix cache; graphs stay, as they
do in a server. Runs warm up until a whole one captures no graph and compiles no kernel; from there on they count, and
one that does either is an error. Beside tokens a second: steps, and the time that the engine's thread computed instead
of waiting for the GPU.

    python benchmarks/engine/bench_throughput.py [--models qwen3-0.6b ...] [--workloads bench256 ...] [--runs 3]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from record import report, spread
from shapes import SHAPES, make_bench_runner, make_model, with_fp8_weights
from warm_runs import NewWork, Row, warm_runs
from workloads import WORKLOADS, Workload

from flashtensors.engine.loop import Engine
from flashtensors.request import BATCH_PRIORITY, EngineRequest, SamplingParams
from flashtensors.runner.device_runner import DeviceRunner
from flashtensors.step import RunnerLimits, StepPlan, StepResult


class TimedRunner:
    """A runner that notes how long its caller waits in `collect`, and works in `launch`, and which steps are new."""

    def __init__(self, runner: DeviceRunner, work: NewWork) -> None:
        self.runner = runner
        self.work = work
        self.new_steps: list[str] = []
        self.launch_s = self.collect_s = 0.0
        self.num_steps = 0

    @property
    def limits(self) -> RunnerLimits:
        """The runner's."""
        return self.runner.limits

    def launch(self, plan: StepPlan) -> None:
        """Start a step."""
        started_s, made = time.perf_counter(), (self.work.num_captures, len(self.work.kernels))
        self.runner.launch(plan)
        self.launch_s += time.perf_counter() - started_s
        self.num_steps += 1
        if made != (self.work.num_captures, len(self.work.kernels)):
            self.new_steps.append(f"{plan.num_tokens} tokens of {len(plan.spans)} sequences, {len(plan.groups)} groups")

    def collect(self) -> StepResult:
        """Wait for a step."""
        started_s = time.perf_counter()
        result = self.runner.collect()
        self.collect_s += time.perf_counter() - started_s
        return result


def run(runner: DeviceRunner, workload: Workload, priority: int, work: NewWork) -> Row:
    """Generate everything once; `work` counts what is made meanwhile."""
    runner.dock(runner.limits.num_blocks)
    timed = TimedRunner(runner, work)
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
        "preemptions": stats.num_preemptions,
        **({"last_new_steps": timed.new_steps[-8:]} if timed.new_steps else {}),
    }


def measure(runner: DeviceRunner, workload: Workload, priority: int, num_runs: int) -> Row:
    """The warm run of median speed, the spread of all warm ones, and what warmed them up."""
    warm_ups, warm = warm_runs(lambda work: run(runner, workload, priority, work), num_runs)
    median = statistics.median_low([each["out_tok_s"] for each in warm])
    typical = next(each for each in warm if each["out_tok_s"] == median)
    return {
        **typical,
        "out_tok_s": spread([each["out_tok_s"] for each in warm]),
        "warm_ups": [{**each, "out_tok_s": round(each["out_tok_s"], 1)} for each in warm_ups],
    }


def profiled(runner: DeviceRunner, workload: Workload, priority: int) -> dict[str, float]:
    """Milliseconds of a whole run by kernel, the longest first, and of the device doing nothing."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        seconds = run(runner, workload, priority, NewWork())["s"]
    kernels = sorted(((event.device_time_total, event.key) for event in trace.key_averages()), reverse=True)
    ms = {name[:70]: round(us / 1e3, 1) for us, name in kernels[:24]}
    return {"all": seconds * 1e3, "busy": round(sum(us for us, _ in kernels) / 1e3, 1), **ms}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(SHAPES))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--runs", type=int, default=3, help="warm runs of each workload")
    parser.add_argument("--interactive", action="store_true", help="as chats: served as they come, prompts at once")
    parser.add_argument("--eager", action="store_true", help="capture no graphs")
    parser.add_argument("--profile", action="store_true", help="one run more, under torch's profiler")
    parser.add_argument("--no-groups", action="store_true", help="read shared prefixes once for each sequence")
    parser.add_argument("--fp8-kv", action="store_true", help="a KV cache of float8_e4m3fn")
    parser.add_argument("--fp8-weights", action="store_true", help="projections in fp8, as `flash pull --quantize fp8`")
    arguments = parser.parse_args()
    kv_dtype = torch.float8_e4m3fn if arguments.fp8_kv else torch.bfloat16
    priority = 0 if arguments.interactive else BATCH_PRIORITY
    rows = []
    for name in arguments.models:
        config = with_fp8_weights(SHAPES[name]) if arguments.fp8_weights else SHAPES[name]
        runner = make_bench_runner(
            make_model(config),
            config,
            enforce_eager=arguments.eager,
            has_groups=not arguments.no_groups,
            kv_dtype=kv_dtype,
        )
        for workload_name in arguments.workloads:
            workload = WORKLOADS[workload_name]()
            measured = measure(runner, workload, priority, arguments.runs)
            rows.append({"model": name, "workload": workload_name, **measured})
            if arguments.profile:
                rows[-1]["kernel_ms"] = profiled(runner, workload, priority)
            print(rows[-1], flush=True)
        runner.close()
        del runner
        torch.cuda.empty_cache()
    report(
        "throughput" + "-fp8-weights" * arguments.fp8_weights + "-fp8-kv" * arguments.fp8_kv,
        rows,
        temperature=0.6,
        priority=priority,
        max_num_seqs=1024,
        max_tokens_per_step=8192,
        weights="fp8" if arguments.fp8_weights else "bfloat16",
        kv_dtype=str(kv_dtype),
    )


if __name__ == "__main__":
    main()
