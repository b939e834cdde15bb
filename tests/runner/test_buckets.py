"""Buckets hold every size, waste little, and are few."""

from __future__ import annotations

import msgspec
import pytest

from flashtensors.request import SamplingParams
from flashtensors.runner.buckets import round_up, shape_of
from flashtensors.step import RunnerLimits, SlotStart, StepPlan, int_rows

LIMITS = RunnerLimits(num_blocks=9, block_size=16, max_slots=100, max_tokens_per_step=500, max_model_len=64)


@pytest.mark.parametrize(("most", "steps", "num_sizes"), [(1024, 4, 29), (8192, 8, 74), (100, 4, 14), (1, 4, 1)])
def test_sizes_hold_what_they_are_for(most: int, steps: int, num_sizes: int):
    sizes = [round_up(number, most, steps_per_octave=steps) for number in range(1, most + 1)]
    for number, size in enumerate(sizes, start=1):
        assert number <= size <= most
        assert size < 2 * number
        assert size - number < max(number / steps, 8)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= num_sizes


def test_a_step_of_one_token_each_has_as_many_rows_as_sequences():
    spans = int_rows([(slot, 5, 1, 1) for slot in range(9)], 4)
    shape = shape_of(StepPlan(step=0, spans=spans), LIMITS, draws=True, has_nuclei=False)
    assert (shape.num_rows, shape.num_seqs, shape.is_decode) == (16, 16, True)


def test_who_begins_with_one_token_may_read_what_another_writes():
    start = SlotStart(slot=0, token_ids=[1], num_prompt_tokens=1, sampling=SamplingParams(), seed=0, stop_token_ids=[])
    plan = StepPlan(step=0, starts=[start], spans=int_rows([(0, 0, 1, 1), (1, 5, 1, 1)], 4))
    assert not shape_of(plan, LIMITS, draws=True, has_nuclei=False).is_decode


def test_a_step_has_no_more_rows_than_the_limits_hold():
    limits = msgspec.structs.replace(LIMITS, max_tokens_per_step=50)
    spans = int_rows([(slot, 5, 1, 1) for slot in range(50)], 4)
    shape = shape_of(StepPlan(step=0, spans=spans), limits, draws=True, has_nuclei=False)
    assert (shape.num_rows, shape.num_seqs) == (50, 50)


def test_prompts_are_rounded_by_tokens():
    spans = int_rows([(0, 0, 300, 0), (1, 7, 1, 1)], 4)
    shape = shape_of(StepPlan(step=0, spans=spans), LIMITS, draws=True, has_nuclei=True)
    assert (shape.num_rows, shape.num_seqs, shape.is_decode, shape.has_groups) == (320, 2, False, False)
