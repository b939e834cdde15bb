"""One engine step in plain ints: what the engine decides and what the runner reports.

The runner keeps all state of a running sequence in a numbered *slot*: its token ids, its block table, its sampling
parameters. The engine sends only changes. A step is one ragged batch of spans; a span reads the tokens
`[start, start + num_tokens)` of its slot, writes their keys and values to the KV cache and, where `samples` is set,
draws the token at position `start + num_tokens` and appends it to the slot. The engine therefore never has to know a
token to schedule the step after it, and several steps may be in flight.

Shapes: A blocks that block tables grow by, S spans, G groups of spans, R spans that sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from .request import SamplingParams, TokenLogprobs

NUM_APPEND_COLUMNS = 3
NUM_SPAN_COLUMNS = 4
NUM_GROUP_COLUMNS = 3


class StepPostponed(Exception):
    """A step cannot be launched yet, as weights that it needs are still being read.

    Nothing of it counts, and nothing else may be launched before it: the same plan is launched again later.
    """


class SlotStart(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence enters a slot, replacing whatever the slot held."""

    slot: int
    token_ids: list[int]
    """All tokens known now: the prompt, and after pre-emption also what was generated."""
    num_prompt_tokens: int
    """Where the answer begins in `token_ids`; penalties and `min_tokens` count from here."""
    sampling: SamplingParams
    seed: int
    """Seed of this sequence's random stream: a draw depends on (seed, position) alone. 64 bits, never None."""
    stop_token_ids: list[int]
    """Ids that end the answer; masked until `sampling.min_tokens` tokens are generated."""


def int_rows(rows: Iterable[tuple[int, ...]], num_columns: int) -> np.ndarray:
    """Tuples as the int32 rows of a plan; no tuples make an array of no rows."""
    return np.array(list(rows), dtype=np.int32).reshape(-1, num_columns)


def _no_rows(num_columns: int) -> np.ndarray:
    return np.empty((0, num_columns), dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """One step. Applied in this order: `starts`, `block_appends`, `spans`. Nobody writes to its arrays.

    A slot occurs in at most one span. A start empties the slot's block table. A slot without a span keeps its state.
    """

    step: int
    """Counts up from 0 by 1."""
    starts: list[SlotStart] = field(default_factory=list)
    block_appends: np.ndarray = field(default_factory=lambda: _no_rows(NUM_APPEND_COLUMNS))
    """int32 [A, 3] of (slot, index in the slot's block table, block id); indices of a slot count up without gaps."""
    spans: np.ndarray = field(default_factory=lambda: _no_rows(NUM_SPAN_COLUMNS))
    """int32 [S, 4] of (slot, start, num_tokens, samples): consecutive tokens of one slot that this step computes;
    `samples` is 1 where the span ends at the last token, so that the next one is drawn, else 0."""
    groups: np.ndarray = field(default_factory=lambda: _no_rows(NUM_GROUP_COLUMNS))
    """int32 [G, 3] of (first_span, num_spans, num_prefix_blocks): neighbours in `spans` whose block tables begin with
    the same blocks, all of them full and before each member's `start`. A hint that saves reads: to pass over it
    changes nothing. No span is in two groups; groups are in the order of their spans."""
    is_steady: bool = False
    """Whether this plan is the previous one a token further: no starts, the same groups, and the same spans, all of one
    token that samples, each `start` greater by 1. Block tables may grow all the same."""

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return int(self.spans[:, 2].sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepResult:
    """What a step drew: one entry for each span with `samples`, in the order of the plan's spans."""

    step: int
    slots: np.ndarray
    """int32 [R]"""
    token_ids: np.ndarray
    """int32 [R]"""
    is_stopped: np.ndarray
    """bool [R]: the token is one of its slot's `stop_token_ids`, and `min_tokens` were generated before it."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By slot, for those that asked."""
    failed: dict[int, str] = field(default_factory=dict)
    """By slot, why no token could be drawn; `token_ids` holds a 0 for it that is no token. The sequence must end."""


class RunnerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner can hold; the engine plans within it."""

    num_blocks: int
    """Physical KV cache blocks, ids 0 … num_blocks - 1."""
    block_size: int
    """Tokens in a block."""
    max_slots: int
    """Sequences that can run at once."""
    max_tokens_per_step: int
    """Most tokens in one step's spans."""
    max_model_len: int
    """Most tokens in one sequence, prompt and answer."""
    max_steps_in_flight: int = 1
    """Steps that may be launched before the first is collected."""
    group_min_members: int = 0
    """Fewest spans that are worth a group in a plan; 0: groups are not used."""
    group_min_blocks: int = 1
    """Fewest shared blocks that are worth a group."""
    group_cost_blocks: float = 0.0
    """What a group costs, in reads of a block by one of its members."""
    group_member_cost_blocks: float = 0.0
    """And as many more for each member."""

    def group_gain(self, num_members: int, num_blocks: int) -> float:
        """Reads of a block that a group saves, less what it costs; below 0 where it is not worth it."""
        if num_members < max(self.group_min_members, 2) or num_blocks < self.group_min_blocks:
            return -1.0
        return (num_members - 1) * num_blocks - self.group_cost_blocks - num_members * self.group_member_cost_blocks
