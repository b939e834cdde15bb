"""Sizes of steps: each is rounded up to one of few, so that few graphs serve all of them."""

from __future__ import annotations

from typing import NamedTuple

from ..step import RunnerLimits, StepPlan

ROW_STEPS = 8
"""Sizes in an octave of rows of steps that compute prompts, whose time grows with every row."""


class StepShape(NamedTuple):
    """What a graph is captured for. Lengths of sequences are no part of it."""

    num_rows: int
    """Rows that the model computes, padding included."""
    num_seqs: int
    """Sequences, padding included."""
    is_decode: bool
    """Every sequence has one new token and reads no other's of this step, and there are as many rows as sequences."""
    has_groups: bool
    """Shared prefixes are read once for their groups."""
    draws: bool
    """Tokens are drawn within the graph; not where logits must be looked at or changed first."""
    has_nuclei: bool
    """Some sequence cuts by top-p without top-k, which takes another pass over the logits."""


def round_up(number: int, most: int, *, steps_per_octave: int = 4) -> int:
    """The least size that holds `number`: 1, 2, 4, 8, 16, then so many in each octave; at most `most`.

    Four in an octave waste an eighth on average where time grows with rows, and nothing where weights are read once
    for all of them; eight waste half of that.
    """
    assert 0 < number <= most, f"{number} of at most {most}"
    octave = 1 << (number - 1).bit_length()
    if octave <= 16:
        return min(octave, most)
    step = max(octave // 2 // steps_per_octave, 8)
    return min(-(-number // step) * step, most)


def bucket_of_seqs(num_seqs: int, limits: RunnerLimits) -> int:
    """Sequences of the bucket for so many."""
    return round_up(num_seqs, min(limits.max_slots, limits.max_tokens_per_step))


def bucket_of_rows(num_tokens: int, limits: RunnerLimits) -> int:
    """Rows of the bucket for so many tokens, where not every sequence has one."""
    return round_up(num_tokens, limits.max_tokens_per_step, steps_per_octave=ROW_STEPS)


def seq_buckets(limits: RunnerLimits) -> list[int]:
    """All numbers of sequences that a step is rounded up to."""
    most = min(limits.max_slots, limits.max_tokens_per_step)
    return sorted({bucket_of_seqs(number, limits) for number in range(1, most + 1)})


def row_buckets(limits: RunnerLimits) -> list[int]:
    """All numbers of rows that a step which computes prompts is rounded up to."""
    return sorted({bucket_of_rows(number, limits) for number in range(1, limits.max_tokens_per_step + 1)})


def shape_of(plan: StepPlan, limits: RunnerLimits, *, draws: bool, has_nuclei: bool) -> StepShape:
    """The bucket of a step.

    Args:
        plan: The step.
        limits: Bounds of every bucket.
        draws: Whether tokens can be drawn within the graph.
        has_nuclei: As in the shape.
    """
    num_tokens, num_spans = plan.num_tokens, len(plan.spans)
    num_seqs = bucket_of_seqs(num_spans, limits)
    # who has just begun may read blocks that another sequence fills in this step
    is_decode = num_tokens == num_spans and not plan.starts
    return StepShape(
        num_rows=num_seqs if is_decode else bucket_of_rows(num_tokens, limits),
        num_seqs=num_seqs,
        is_decode=is_decode,
        has_groups=len(plan.groups) > 0,
        draws=draws,
        has_nuclei=has_nuclei,
    )
