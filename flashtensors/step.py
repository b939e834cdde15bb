"""One engine step as plain ints: what the engine decides and what the runner reports.

The runner keeps all state of a running sequence in a numbered *slot*: its token ids, its block table, its sampling
parameters. The engine sends only changes. A step is one ragged batch of spans; a span reads the tokens
`[start, start + num_tokens)` of its slot, writes their keys and values to the KV cache and, where `samples` is set,
draws the token at position `start + num_tokens` and appends it to the slot. The engine therefore never has to know a
token to schedule the step after it, and several steps may be in flight.
"""

from __future__ import annotations

import msgspec

from .request import SamplingParams, TokenLogprobs


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


class BlockAppend(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that a slot's block table grows by, in order."""

    slot: int
    block_ids: list[int]


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one slot that this step computes."""

    slot: int
    start: int
    num_tokens: int
    samples: bool
    """Whether the span ends at the last token, so that the next one is drawn."""


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Applied in this order: `starts`, `block_appends`, `spans`.

    A slot occurs in at most one span. A start empties the slot's block table. A slot without a span keeps its state.
    """

    step: int
    """Counts up from 0 by 1."""
    starts: list[SlotStart] = []
    block_appends: list[BlockAppend] = []
    spans: list[Span] = []

    @property
    def num_tokens(self) -> int:
        """Tokens that this step computes."""
        return sum(span.num_tokens for span in self.spans)


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step drew: one entry for each span with `samples`, in the order of the plan's spans."""

    step: int
    slots: list[int]
    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    """By slot, for those that asked."""
    failed: dict[int, str] = {}
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
