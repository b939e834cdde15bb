from __future__ import annotations

import msgspec
import pytest

from flashtensors.request import SamplingParams
from flashtensors.step import (
    NUM_APPEND_COLUMNS,
    NUM_GROUP_COLUMNS,
    NUM_SPAN_COLUMNS,
    RunnerLimits,
    SlotStart,
    StepPlan,
    int_rows,
)
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


def plan(
    step: int,
    *spans: tuple[int, int, int, int],
    starts: tuple[SlotStart, ...] = (),
    appends: tuple[tuple[int, int, int], ...] = (),
    groups: tuple[tuple[int, int, int], ...] = (),
    is_steady: bool = False,
) -> StepPlan:
    return StepPlan(
        step=step,
        starts=list(starts),
        block_appends=int_rows(appends, NUM_APPEND_COLUMNS),
        spans=int_rows(spans, NUM_SPAN_COLUMNS),
        groups=int_rows(groups, NUM_GROUP_COLUMNS),
        is_steady=is_steady,
    )


def prefill(slot: int = 0, blocks: tuple[int, ...] = (0, 1)) -> StepPlan:
    appends = tuple((slot, index, block_id) for index, block_id in enumerate(blocks))
    return plan(0, (slot, 0, 3, 1), starts=(start(slot),), appends=appends)


def test_two_steps_by_hand_give_the_oracles_answer() -> None:
    runner = FakeRunner(LIMITS)
    runner.launch(prefill())
    drawn = runner.collect().token_ids.tolist()
    runner.launch(plan(1, (0, 3, 1, 1)))
    drawn += runner.collect().token_ids.tolist()
    assert drawn == fake_answer(PROMPT, SamplingParams(), seed=9, max_length=5)


def test_a_block_that_another_slot_overwrote_changes_the_answer() -> None:
    runner = FakeRunner(LIMITS)
    runner.launch(prefill())
    drawn = runner.collect().token_ids.tolist()
    thief = plan(1, (0, 3, 1, 1), (1, 0, 2, 1), starts=(start(1, [1, 2]),), appends=((1, 0, 0),))
    runner.launch(thief)
    drawn += runner.collect().token_ids.tolist()[:1]
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


BOTH = ((0, 0, 0), (0, 1, 1))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (plan(0), "a step of 0 tokens"),
        (plan(1, (0, 0, 1, 1)), "step 1 comes after -1"),
        (plan(0, (0, 0, 5, 1)), "a step of 5 tokens"),
        (plan(0, (2, 0, 1, 0), starts=(start(2),)), "no slot 2"),
        (prefill(blocks=(0,)), "beyond its block table"),
        (prefill(blocks=(0, 0)), "twice in one table"),
        (prefill(blocks=(0, 4)), "no such block"),
        (plan(0, (0, 0, 3, 1), starts=(start(),), appends=BOTH[1:]), "a gap"),
        (plan(0, (0, 0, 3, 0), starts=(start(),), appends=BOTH), "draws exactly when"),
        (plan(0, (0, 2, 1, 1), starts=(start(),), appends=BOTH), "nobody wrote"),
        (plan(0, (0, 0, 4, 1), starts=(start(),), appends=BOTH), "beyond its tokens"),
        (plan(0, (0, 0, 1, 0), (0, 1, 1, 0), starts=(start(),), appends=BOTH), "in two spans"),
        (plan(0, (0, 0, 3, 1), starts=(start(),), appends=BOTH, is_steady=True), "not steady"),
    ],
)
def test_broken_rules_are_named(broken: StepPlan, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        FakeRunner(LIMITS).launch(broken)


GROUPED = msgspec.structs.replace(LIMITS, group_min_members=2)


@pytest.mark.parametrize(
    ("groups", "appends", "complaint"),
    [
        (((0, 2, 1),), ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)), "without a common prefix"),
        (((0, 1, 1),), ((0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 3)), "too small"),
        (((0, 2, 0),), ((0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 3)), "shares too little"),
        (((1, 2, 1),), ((0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 3)), "beyond the spans"),
        (((0, 2, 2),), ((0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)), "writes to its prefix"),
    ],
)
def test_groups_that_share_nothing_are_named(
    groups: tuple[tuple[int, int, int], ...], appends: tuple[tuple[int, int, int], ...], complaint: str
) -> None:
    starts = (start(0), start(1))
    broken = plan(0, (0, 2, 1, 1), (1, 2, 1, 1), starts=starts, appends=appends, groups=groups)
    with pytest.raises(AssertionError, match=complaint):
        FakeRunner(GROUPED).launch(broken)


@pytest.mark.parametrize("num_generated", [0, 1])
def test_a_stop_token_is_told_once_min_tokens_are_there(num_generated: int) -> None:
    any_but_0 = list(range(1, 64))
    known = msgspec.structs.replace(
        start(min_tokens=1), num_prompt_tokens=len(PROMPT) - num_generated, stop_token_ids=any_but_0
    )
    runner = FakeRunner(LIMITS)
    runner.launch(plan(0, (0, 0, 3, 1), starts=(known,), appends=BOTH))
    result = runner.collect()
    assert result.is_stopped.tolist() == [num_generated == 1]
    assert (result.token_ids[0] == 0) == (num_generated == 0)


def test_rules_that_need_a_history() -> None:
    runner = FakeRunner(LIMITS)
    with pytest.raises(AssertionError, match="without a step in flight"):
        runner.collect()
    runner.launch(prefill())
    with pytest.raises(AssertionError, match="too many steps in flight"):
        runner.launch(plan(1, (0, 3, 1, 1)))
    runner.collect()
    with pytest.raises(AssertionError, match="skips or repeats"):
        runner.launch(plan(1, (0, 2, 1, 1)))
