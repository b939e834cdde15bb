"""How much CPU time does a step cost on the host when the device costs nothing?

The engine drives a runner that does no work, with two steps in flight, at 64, 256 and 1,024 sequences. Everything but
the runner's own time counts: scheduling, the plan, tokens, deltas. Rows:

* steady: everybody decodes, nobody comes or goes, answers are not streamed;
* streamed: the same, and every answer is read as it comes, at the default interval, a step being 4 ms;
* traffic: answers of 100 to 900 tokens, a new request for each that ends; prompts of 500 tokens, of which half share
  their first 256;
* full: the same, but the KV cache holds two thirds of what would be wanted, so that admission looks ahead;
* grouped: traffic whose prompts share 768 tokens among 16 of a kind.

Prefix groups are on everywhere, from 4 members and 4 blocks.

Correctness first: with a deterministic fake runner, the same traffic gives the tokens that the oracle gives.

    python benchmarks/engine/bench_host.py --steps 2000
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.record import report
from flashtensors.engine.loop import Engine
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.step import RunnerLimits, StepPlan, StepResult
from flashtensors.testing.fake_runner import FakeRunner, fake_answer

BLOCK_SIZE = 64
PROMPT_TOKENS = 500
STEP_S = 0.004
"""What the engine's clock says that a step takes."""

MEAN_TOKENS = 1000
"""Of a sequence in traffic, prompt and answer."""


class IdleRunner:
    """Draws token 1 for whoever asks; counts the time that it takes itself."""

    def __init__(self, limits: RunnerLimits) -> None:
        self.limits = limits
        self.own_s = 0.0
        self.num_tokens = 0
        self._in_flight: deque[StepPlan] = deque()

    def launch(self, plan: StepPlan) -> None:
        """Take a plan."""
        begin = time.thread_time()
        self._in_flight.append(plan)
        self.num_tokens += len(plan.spans)
        self.own_s += time.thread_time() - begin

    def collect(self) -> StepResult:
        """What the oldest plan drew."""
        begin = time.thread_time()
        plan = self._in_flight.popleft()
        slots = plan.spans[plan.spans[:, 3] == 1, 0]
        result = StepResult(
            step=plan.step,
            slots=slots,
            token_ids=np.ones(len(slots), dtype=np.int32),
            is_stopped=np.zeros(len(slots), dtype=bool),
        )
        self.own_s += time.thread_time() - begin
        return result


@dataclass(frozen=True)
class Case:
    """One kind of traffic."""

    name: str
    is_streamed: bool = False
    has_traffic: bool = False
    cache_share: float = 2.0
    """Of the blocks that all sequences of mean length need together."""
    group_size: int = 0


CASES = [
    Case("steady"),
    Case("streamed", is_streamed=True),
    Case("traffic", has_traffic=True),
    Case("full", has_traffic=True, cache_share=0.67),
    Case("grouped", has_traffic=True, group_size=16),
]


class Load:
    """Keeps an engine at a number of sequences."""

    def __init__(self, case: Case, num_sequences: int) -> None:
        self.case = case
        self.random = random.Random(0)
        self.num_added = 0
        self.num_steps = 0
        self.shared = [self.random.randrange(30_000) for _ in range(768)]
        num_blocks = int(case.cache_share * num_sequences * MEAN_TOKENS / BLOCK_SIZE)
        self.runner = IdleRunner(
            RunnerLimits(
                num_blocks=num_blocks if case.has_traffic else num_sequences * 160,
                block_size=BLOCK_SIZE,
                max_slots=num_sequences,
                max_tokens_per_step=8192,
                max_model_len=16_384,
                max_steps_in_flight=2,
                group_min_members=4,
                group_min_blocks=4,
            )
        )
        self.engine = Engine(self.runner, clock=lambda: self.num_steps * STEP_S)
        for _ in range(num_sequences):
            self.add()

    def add(self) -> None:
        """Ask for one more answer."""
        answer = self.random.randint(100, 900) if self.case.has_traffic else 9_000
        if self.case.group_size:
            kind = self.num_added // self.case.group_size
            prompt = [kind, *self.shared[1:], *(self.random.randrange(30_000) for _ in range(20))]
        else:
            num_shared = 256 if self.case.has_traffic and self.num_added % 2 else 0
            own = [self.random.randrange(30_000) for _ in range(PROMPT_TOKENS - num_shared)]
            prompt = self.shared[:num_shared] + own
        request = EngineRequest(
            request_id=str(self.num_added),
            model="idle",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=answer, ignore_eos=True, seed=0),
            is_streamed=self.case.is_streamed,
        )
        self.num_added += 1
        self.engine.add(request, [])

    def step(self) -> float:
        """One step, and a new request for each that ended; seconds on the host, without the runner."""
        self.num_steps += 1
        own_s, begin = self.runner.own_s, time.thread_time()
        deltas = self.engine.step()
        host_s = time.thread_time() - begin - (self.runner.own_s - own_s)
        for delta in deltas:
            if delta.finish_reason is not None:
                self.add()
        return host_s


def check_tokens() -> None:
    """The engine gives the oracle's answers to mixed traffic, streamed or not."""
    limits = RunnerLimits(
        num_blocks=60, block_size=4, max_slots=8, max_tokens_per_step=32, max_model_len=128, max_steps_in_flight=2
    )
    engine = Engine(FakeRunner(limits))
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = {str(number): [number, *range(10), number] for number in range(24)}
    got: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        is_streamed = int(name) % 2 == 0
        request = EngineRequest(
            request_id=name, model="fake", prompt_token_ids=prompt, sampling=sampling, is_streamed=is_streamed
        )
        engine.add(request, [])
    while engine.has_work:
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids
    for name, prompt in prompts.items():
        assert got[name] == fake_answer(prompt, sampling, seed=0, max_length=len(prompt) + 40), name


def measure(case: Case, num_sequences: int, num_steps: int) -> dict[str, Any]:
    load = Load(case, num_sequences)
    for _ in range(300 if not case.has_traffic else 1500):  # all prompts computed; traffic: lengths are mixed
        load.step()
    num_added, num_tokens = load.num_added, load.runner.num_tokens
    samples = sorted(load.step() * 1e6 for _ in range(num_steps))
    stats = load.engine.stats()
    return {
        "case": case.name,
        "sequences": num_sequences,
        "running_at_end": stats.num_running,
        "rows_per_step": round((load.runner.num_tokens - num_tokens) / num_steps, 1),
        "requests_per_step": round((load.num_added - num_added) / num_steps, 3),
        "preemptions": stats.num_preemptions,
        "host_us_per_step": {
            "median": round(statistics.median(samples), 1),
            "mean": round(statistics.fmean(samples), 1),
            "p90": round(samples[int(len(samples) * 0.9)], 1),
            "p99": round(samples[int(len(samples) * 0.99)], 1),
            "n": num_steps,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    arguments = parser.parse_args()
    check_tokens()
    rows = []
    for case in CASES:
        if case.name in arguments.cases:
            for num_sequences in arguments.sequences:
                rows.append(measure(case, num_sequences, arguments.steps))
                print(rows[-1], flush=True)
    report("host", rows, block_size=BLOCK_SIZE, steps_in_flight=2)


if __name__ == "__main__":
    main()
