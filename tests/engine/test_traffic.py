"""Random traffic: every answer is what the oracle gives for it alone, whatever else happens."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flashtensors.errors import ContextTooLong
from flashtensors.request import EngineRequest
from flashtensors.step import RunnerLimits

from .traffic import VOCAB_SIZE, Traffic, request

NUM_SEEDS = 2000


def random_limits(rng: random.Random) -> RunnerLimits:
    block_size = rng.choice([1, 2, 3, 4, 8])
    num_blocks = rng.randint(2, 24)
    return RunnerLimits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_slots=rng.randint(1, 6),
        max_tokens_per_step=rng.choice([1, 2, 3, 5, 8, 16, 64]),
        max_model_len=rng.randint(2, 60),
        max_steps_in_flight=rng.randint(1, 3),
        group_min_members=rng.choice([0, 2, 3]),
        group_min_blocks=rng.choice([1, 2]),
    )


def random_request(rng: random.Random, request_id: str, limits: RunnerLimits, roots: list[list[int]]) -> EngineRequest:
    context = min(limits.max_model_len, limits.num_blocks * limits.block_size)
    prompt = rng.choice(roots)[: rng.randint(0, 40)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 6))]
    prompt = prompt[: max(1, context - 1)]
    room = context - len(prompt)
    max_tokens = rng.choice([None, rng.randint(1, room), rng.randint(1, room)])
    return request(
        request_id,
        prompt,
        priority=rng.choice([0, 0, 0, 1, 5, -1]),
        is_streamed=rng.random() < 0.7,
        n=rng.choice([1, 1, 1, 2, 4]),
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randint(-5, 5),
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, min(4, max_tokens or 4)),
        stop_token_ids=rng.choice([[], [5], [7, 9]]),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, None, 0, 2]),
    )


def run_random_traffic(seed: int, *, postpone_rate: float = 0.0) -> Traffic:
    rng = random.Random(seed)
    limits = random_limits(rng)
    traffic = Traffic(
        limits,
        enable_prefix_caching=rng.random() < 0.8,
        stream_interval_s=rng.choice([0.0, 0.0, 1e-4, 1e9]),
        postpone_rate=postpone_rate,
    )
    roots = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(2)]
    abort_rate = rng.choice([0.0, 0.1, 0.3])
    for number in range(rng.randint(1, 8)):
        traffic.add(random_request(rng, f"r{number}", limits, roots))
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 6)):
                traffic.step()
                if rng.random() < abort_rate:
                    chosen = rng.choice(list(traffic.requests))
                    traffic.abort(chosen, rng.choice([None, 0, 1, 7]), rng.choice(["abort", "stop"]))
    traffic.drain()
    return traffic


@pytest.mark.parametrize("part", range(5))
def test_every_answer_is_the_one_it_would_get_alone(part: int) -> None:
    for seed in range(part * NUM_SEEDS // 5, (part + 1) * NUM_SEEDS // 5):
        try:
            run_random_traffic(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def test_a_step_that_is_postponed_changes_no_answer() -> None:
    num_postponed = 0
    for seed in range(400):
        try:
            num_postponed += run_random_traffic(seed, postpone_rate=0.5).runner.num_postponed
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert num_postponed > 1000


def test_the_traffic_reaches_what_it_is_meant_to_reach() -> None:
    runs = [run_random_traffic(seed) for seed in range(100)]
    stats = [run.engine.stats() for run in runs]
    assert sum(s.num_preemptions > 0 for s in stats) > 10
    assert sum(s.prefix_hits > 0 for s in stats) > 20
    assert sum(bool(run.aborted) for run in runs) > 10
    assert {reason for run in runs for reason in run.reasons.values()} == {"stop", "length", "abort"}


def test_who_ends_by_length_alone_never_gives_way() -> None:
    num_waited = 0
    for seed in range(300):
        rng = random.Random(seed)
        limits = random_limits(rng)
        traffic = Traffic(limits, enable_prefix_caching=rng.random() < 0.8)
        roots = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(2)]
        for number in range(8):
            wanted = random_request(rng, f"r{number}", limits, roots)
            sampling = msgspec.structs.replace(wanted.sampling, ignore_eos=True, stop_token_ids=[])
            traffic.add(msgspec.structs.replace(wanted, priority=0, sampling=sampling))
            for _ in range(rng.randint(0, 4)):
                traffic.step()
            num_waited += traffic.engine.stats().num_waiting > 0
        traffic.drain()
        assert traffic.engine.stats().num_preemptions == 0, f"seed {seed}"
    assert num_waited > 300


class EngineMachine(RuleBasedStateMachine):
    """Hypothesis finds the traffic, and shrinks what breaks."""

    @initialize(
        num_blocks=st.integers(1, 12),
        block_size=st.integers(1, 4),
        max_slots=st.integers(1, 4),
        max_tokens_per_step=st.integers(1, 12),
        max_model_len=st.integers(2, 30),
        max_steps_in_flight=st.integers(1, 3),
        group_min_members=st.integers(0, 3),
    )
    def start(self, **values: int) -> None:
        self.traffic = Traffic(RunnerLimits(**values))

    @rule(
        num_shared=st.integers(0, 16),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
        max_tokens=st.none() | st.integers(1, 12),
    )
    def add(self, num_shared: int, tail: list[int], n: int, priority: int, max_tokens: int | None) -> None:
        name = f"r{len(self.traffic.requests)}"
        prompt = [*range(4, 4 + num_shared), *tail]
        wanted = request(name, prompt, priority=priority, n=n, max_tokens=max_tokens)
        context = min(
            self.traffic.limits.max_model_len, self.traffic.limits.num_blocks * self.traffic.limits.block_size
        )
        if len(prompt) + (max_tokens or 1) > context:
            with pytest.raises(ContextTooLong):
                self.traffic.add(wanted)
        else:
            self.traffic.add(wanted)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.traffic.step()

    @rule(data=st.data(), index=st.none() | st.integers(0, 3), reason=st.sampled_from(["abort", "stop"]))
    def abort(self, data: st.DataObject, index: int | None, reason: str) -> None:
        if self.traffic.requests:
            self.traffic.abort(data.draw(st.sampled_from(sorted(self.traffic.requests))), index, reason)

    @invariant()
    def hold(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.engine.scheduler.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "traffic"):
            self.traffic.drain()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


@given(seed=st.integers(2**20, 2**40))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_depth_chunks_and_cache_do_not_change_an_answer(seed: int) -> None:
    answers = []
    for depth, budget, is_cached in ((1, 64, False), (3, 2, True), (2, 7, True)):
        rng = random.Random(seed)
        limits = RunnerLimits(
            num_blocks=14,
            block_size=4,
            max_slots=4,
            max_tokens_per_step=budget,
            max_model_len=50,
            max_steps_in_flight=depth,
        )
        traffic = Traffic(limits, enable_prefix_caching=is_cached)
        root = [rng.randrange(VOCAB_SIZE) for _ in range(40)]
        for number in range(5):
            traffic.add(random_request(rng, f"r{number}", limits, [root]))
        traffic.drain()
        answers.append(traffic.tokens)
    assert answers[0] == answers[1] == answers[2]
