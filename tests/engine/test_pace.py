"""Prompts of batch work are spread over the steps of longer answers, and nobody else is kept waiting."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flashtensors.engine.lengths import MIN_OBSERVATIONS
from flashtensors.engine.loop import Engine
from flashtensors.engine.pace import ROW_TILE, STEPS_BETWEEN, TOKENS_BESIDE_CHATS
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.step import RunnerLimits, StepPlan
from flashtensors.testing.fake_runner import FakeRunner

LIMITS = RunnerLimits(num_blocks=6000, block_size=16, max_slots=64, max_tokens_per_step=4096, max_model_len=1024)

Job = tuple[int, int]
"""Tokens of a prompt, and of its answer."""


class Watched(FakeRunner):
    """Remembers what steps computed."""

    def __init__(self, limits: RunnerLimits = LIMITS) -> None:
        super().__init__(limits, vocab_size=32)
        self.num_tokens: list[int] = []

    def launch(self, plan: StepPlan) -> None:
        self.num_tokens.append(plan.num_tokens)
        super().launch(plan)


def add(engine: Engine, name: str, job: Job, *, priority: int, ignore_eos: bool = True) -> None:
    source = random.Random(name)
    prompt = [source.randrange(32) for _ in range(job[0])]
    sampling = SamplingParams(seed=0, max_tokens=job[1], ignore_eos=ignore_eos)
    engine.add(
        EngineRequest(
            request_id=name, model="m", prompt_token_ids=prompt, sampling=sampling, priority=priority, is_streamed=False
        ),
        [31],
    )


def run(jobs: list[Job], *, priority: int, ignore_eos: bool = True) -> Watched:
    runner = Watched()
    engine = Engine(runner, seeds=random.Random(0))
    for number, job in enumerate(jobs):
        add(engine, str(number), job, priority=priority, ignore_eos=ignore_eos)
    while engine.has_work:
        engine.step()
    return runner


def random_jobs(seed: int, num_jobs: int = 40) -> list[Job]:
    source = random.Random(seed)
    longest = source.choice([20, 100, 300])
    return [(source.randint(1, 500), source.randint(1, longest)) for _ in range(num_jobs)]


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_takes_hardly_more_steps_than_its_longest_answer(seed: int) -> None:
    jobs = random_jobs(seed)
    paced = run(jobs, priority=1)
    num_tokens = sum(prompt + answer - 1 for prompt, answer in jobs)
    assert sum(paced.num_tokens) == num_tokens, "tokens were computed twice, or not at all"
    least = max(max(answer for _, answer in jobs), num_tokens // LIMITS.max_tokens_per_step)
    assert len(paced.num_tokens) <= least + 4


def test_steps_are_more_alike_than_without_a_pace() -> None:
    jobs = [(300, 10 + 7 * number) for number in range(40)]
    paced, hasty = run(jobs, priority=1), run(jobs, priority=0)
    assert len(paced.num_tokens) <= len(hasty.num_tokens)
    assert np.std(paced.num_tokens) < 0.5 * np.std(hasty.num_tokens)


def test_steps_with_prompts_are_filled_up_to_whole_tiles() -> None:
    num_tokens = run([(300, 10 + 7 * number) for number in range(40)], priority=1).num_tokens
    with_prompts = [number for number in num_tokens if number > LIMITS.max_slots]
    assert len(with_prompts) > 20
    assert all(number % ROW_TILE == 0 for number in with_prompts[:-1])


def test_answers_of_one_length_begin_at_once() -> None:
    assert run([(200, 50)] * 10, priority=1).num_tokens == run([(200, 50)] * 10, priority=0).num_tokens


def test_a_single_prompt_is_computed_in_one_step() -> None:
    assert run([(900, 20)], priority=1).num_tokens[0] == 900


def test_nothing_is_held_back_while_lengths_are_not_known() -> None:
    jobs = [(300, 20 * number) for number in range(1, 11)]
    assert run(jobs, priority=1, ignore_eos=False).num_tokens[0] == 3000


def test_what_was_learnt_of_lengths_sets_the_pace() -> None:
    runner = Watched()
    engine = Engine(runner, seeds=random.Random(0))
    for number in range(MIN_OBSERVATIONS):
        engine.scheduler.lengths.add(50 + number)
    for number in range(10):
        add(engine, str(number), (300, 60 - 6 * number), priority=1, ignore_eos=False)
    engine.step()
    assert 300 <= runner.num_tokens[0] < 3000


def test_answers_that_may_become_long_are_not_held_back() -> None:
    runner = Watched()
    engine = Engine(runner, seeds=random.Random(0))
    for _ in range(MIN_OBSERVATIONS):
        engine.scheduler.lengths.add(10)
    for number in range(10):
        add(engine, str(number), (300, 200 - number), priority=1, ignore_eos=False)
    engine.step()
    assert runner.num_tokens[0] == 3000


def start_batch(limits: RunnerLimits = LIMITS) -> tuple[Watched, Engine]:
    """A batch of which a part still waits."""
    runner = Watched(limits)
    engine = Engine(runner, seeds=random.Random(0))
    for number in range(20):
        add(engine, str(number), (300, 30 * (number + 1)), priority=1)
    for _ in range(STEPS_BETWEEN // 2):
        engine.step()
    assert engine.stats().num_waiting > 0, "the batch did not wait"
    return runner, engine


def test_who_waits_for_a_first_token_comes_at_once() -> None:
    runner, engine = start_batch()
    num_waiting = engine.stats().num_waiting
    add(engine, "chat", (1000, 5), priority=0)
    num_tokens = len(runner.num_tokens)
    engine.step()
    assert runner.num_tokens[num_tokens] >= 1000, "the batch kept a chat waiting"
    assert engine.stats().num_waiting <= num_waiting


def test_beside_a_chat_a_batch_takes_small_steps_and_goes_on() -> None:
    runner, engine = start_batch()
    add(engine, "chat", (100, 40), priority=0)
    engine.step()
    for number in range(100, 160):
        add(engine, str(number), (900, 10), priority=1)
    begin = len(runner.num_tokens)
    for _ in range(20):
        engine.step()
    assert max(runner.num_tokens[begin:]) <= TOKENS_BESIDE_CHATS
    assert sum(runner.num_tokens[begin:]) > 10 * TOKENS_BESIDE_CHATS, "the batch stood still"
    while any(delta.request_id == "chat" for delta in engine.step()) or engine.stats().num_waiting:
        pass
    assert max(runner.num_tokens[begin:]) > TOKENS_BESIDE_CHATS, "the batch did not hurry when the chat was over"
