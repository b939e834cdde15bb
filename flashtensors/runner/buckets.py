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
    """Every sequence has one new token, and as many rows as sequences."""
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


def shape_of(plan: StepPlan, limits: RunnerLimits, *, draws: bool, has_nuclei: bool) -> StepShape:
    """The bucket of a step.

    Args:
        plan: The step.
        limits: Bounds of every bucket.
        draws: Whether tokens can be drawn within the graph.
        has_nuclei: As in the shape.
    """
    num_tokens, num_spans = plan.num_tokens, len(plan.spans)
    num_seqs = round_up(num_spans, min(limits.max_slots, limits.max_tokens_per_step))
    is_decode = num_tokens == num_spans
    return StepShape(
        num_rows=num_seqs
        if is_decode
        else round_up(num_tokens, limits.max_tokens_per_step, steps_per_octave=ROW_STEPS),
        num_seqs=num_seqs,
        is_decode=is_decode,
        has_groups=len(plan.groups) > 0,
        draws=draws,
        has_nuclei=has_nuclei,
    )
