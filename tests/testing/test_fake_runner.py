from __future__ import annotations

import pytest

from flashtensors.request import SamplingParams
from flashtensors.step import BlockAppend, RunnerLimits, SlotStart, Span, StepPlan
from flashtensors.testing.fake_runner import FakeRunner, fake_answer

LIMITS = RunnerLimits(num_blocks=4, block_size=2, max_slots=2, max_tokens_per_step=4, max_model_len=6)
PROMPT = [5, 6, 7]


def start(slot: int = 0, prompt: list[int] = PROMPT, **sampling: object) -> SlotStart:
    return SlotStart(
        slot=slot,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(**sampling),  # pyright: ignore[reportArgumentType]
        seed=9,
        stop_token_ids=[],
    )


def prefill(slot: int = 0, blocks: tuple[int, ...] = (0, 1)) -> StepPlan:
    return StepPlan(
        step=0, starts=[start(slot)], block_appends=[BlockAppend(slot, list(blocks))], spans=[Span(slot, 0, 3, True)]
    )


def test_two_steps_by_hand_give_the_oracles_answer() -> None:
    runner = FakeRunner(LIMITS)
    runner.launch(prefill())
    drawn = runner.collect().token_ids
    runner.launch(StepPlan(step=1, spans=[Span(0, 3, 1, True)]))
    drawn += runner.collect().token_ids
    assert drawn == fake_answer(PROMPT, SamplingParams(), seed=9, max_length=5)


def test_a_block_that_another_slot_overwrote_changes_the_answer() -> None:
    runner = FakeRunner(LIMITS)
    runner.launch(prefill())
    drawn = runner.collect().token_ids
    thief = StepPlan(
        step=1,
        starts=[start(1, [1, 2])],
        block_appends=[BlockAppend(1, [0])],
        spans=[Span(0, 3, 1, True), Span(1, 0, 2, True)],
    )
    runner.launch(thief)
    drawn += runner.collect().token_ids[:1]
    expected = fake_answer(PROMPT, SamplingParams(), seed=9, max_length=5)
    assert drawn[0] == expected[0]
    assert drawn[1] != expected[1]


def test_seeds_count_only_with_temperature_and_stops_wait_for_min_tokens() -> None:
    def answer(seed: int, temperature: float) -> list[int]:
        return fake_answer(PROMPT, SamplingParams(temperature=temperature), seed=seed, max_length=20)

    assert answer(1, 0.0) == answer(2, 0.0)
    assert answer(1, 1.0) != answer(2, 1.0)
    patient = SamplingParams(min_tokens=4, max_tokens=9)
    masked = fake_answer(PROMPT, patient, seed=1, stop_token_ids=range(1, 64), max_length=12)
    assert masked[:4] == [0, 0, 0, 0]
    assert len(masked) >= 5


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (StepPlan(step=0), "a step of 0 tokens"),
        (StepPlan(step=1, spans=[Span(0, 0, 1, True)]), "step 1 comes after -1"),
        (StepPlan(step=0, spans=[Span(0, 0, 5, True)]), "a step of 5 tokens"),
        (StepPlan(step=0, starts=[start(2)], spans=[Span(2, 0, 1, False)]), "no slot 2"),
        (prefill(blocks=(0,)), "beyond its block table"),
        (prefill(blocks=(0, 0)), "twice in one table"),
        (prefill(blocks=(0, 4)), "no such block"),
        (
            StepPlan(step=0, starts=[start()], block_appends=[BlockAppend(0, [0, 1])], spans=[Span(0, 0, 3, False)]),
            "draws exactly when",
        ),
        (
            StepPlan(step=0, starts=[start()], block_appends=[BlockAppend(0, [0, 1])], spans=[Span(0, 2, 1, True)]),
            "nobody wrote",
        ),
        (
            StepPlan(step=0, starts=[start()], block_appends=[BlockAppend(0, [0, 1])], spans=[Span(0, 0, 4, True)]),
            "beyond its tokens",
        ),
        (
            StepPlan(
                step=0,
                starts=[start()],
                block_appends=[BlockAppend(0, [0, 1])],
                spans=[Span(0, 0, 1, False), Span(0, 1, 1, False)],
            ),
            "in two spans",
        ),
    ],
)
def test_broken_rules_are_named(plan: StepPlan, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        FakeRunner(LIMITS).launch(plan)


def test_rules_that_need_a_history() -> None:
    runner = FakeRunner(LIMITS)
    with pytest.raises(AssertionError, match="without a step in flight"):
        runner.collect()
    runner.launch(prefill())
    with pytest.raises(AssertionError, match="too many steps in flight"):
        runner.launch(StepPlan(step=1, spans=[Span(0, 3, 1, True)]))
    runner.collect()
    with pytest.raises(AssertionError, match="skips or repeats"):
        runner.launch(StepPlan(step=1, spans=[Span(0, 2, 1, True)]))
