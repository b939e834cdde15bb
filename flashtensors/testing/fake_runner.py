"""A runner without tensors: a two-layer model on ints whose every token depends on all the cache it reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ..request import SamplingParams, TokenLogprobs
from ..step import RunnerLimits, SlotStart, StepPlan, StepResult

_Span = tuple[int, int, int, int]  # slot, start, num_tokens, samples


@dataclass(slots=True)
class _Slot:
    start: SlotStart
    token_ids: list[int]
    block_ids: list[int]
    num_computed: int | None = None  # None until the first span says how much of the prefix is shared


class FakeRunner:
    """Implements `engine.runner_protocol.Runner` on ints, for tests of whatever drives a runner.

    Each KV entry of the first layer is a token and its position, each of the second a digest of all entries of the
    first up to its own, and a token is drawn from a digest of all entries of the second, read through the block
    table. A block shared with the wrong sequence, given away too early, or filled with the wrong tokens changes the
    answer; `fake_answer` says what it should have been. Broken rules of the protocol raise `AssertionError`.

    Args:
        limits: What to pretend to hold.
        vocab_size: Tokens are drawn from 0 … vocab_size - 1.
    """

    def __init__(self, limits: RunnerLimits, *, vocab_size: int = 64) -> None:
        self.limits = limits
        self.vocab_size = vocab_size
        self.plans: list[StepPlan] = []
        """Every plan that was launched, for tests to look at."""
        self._slots: dict[int, _Slot] = {}
        num_entries = limits.num_blocks * limits.block_size
        self._layer0: list[int | None] = [None] * num_entries
        self._layer1: list[int | None] = [None] * num_entries
        self._results: deque[StepResult] = deque()

    @property
    def num_in_flight(self) -> int:
        """Steps launched and not yet collected."""
        return len(self._results)

    def launch(self, plan: StepPlan) -> None:
        """Compute the step; the result waits for `collect`."""
        assert plan.step == len(self.plans), f"step {plan.step} comes after {len(self.plans) - 1}"
        assert self.num_in_flight < self.limits.max_steps_in_flight, "too many steps in flight"
        assert 0 < plan.num_tokens <= self.limits.max_tokens_per_step, f"a step of {plan.num_tokens} tokens"
        self.plans.append(plan)
        self._apply_starts(plan.starts)
        self._apply_block_appends(plan.block_appends)
        spans: list[_Span] = [tuple(row) for row in plan.spans.tolist()]
        self._check_steady(plan)
        self._check_spans(spans)
        self._check_groups(plan)
        for layer in (self._write_layer0, self._write_layer1):
            for span in spans:
                layer(self._slots[span[0]], span)
        self._results.append(self._draw_all(plan.step, [slot for slot, _, _, samples in spans if samples]))

    def collect(self) -> StepResult:
        """Return the oldest result."""
        assert self._results, "collect() without a step in flight"
        return self._results.popleft()

    def _apply_starts(self, starts: Sequence[SlotStart]) -> None:
        for start in starts:
            assert 0 <= start.slot < self.limits.max_slots, f"no slot {start.slot}"
            assert 0 < start.num_prompt_tokens <= len(start.token_ids), "a start without a prompt"
            self._slots[start.slot] = _Slot(start, list(start.token_ids), [])

    def _apply_block_appends(self, block_appends: np.ndarray) -> None:
        for slot, index, block_id in block_appends.tolist():
            block_ids = self._slots[slot].block_ids
            assert index == len(block_ids), "a block table with a gap"
            assert 0 <= block_id < self.limits.num_blocks, "no such block"
            assert block_id not in block_ids, "a block occurs twice in one table"
            block_ids.append(block_id)

    def _check_steady(self, plan: StepPlan) -> None:
        """A plan is steady exactly when it is the previous one a token further."""
        previous = self.plans[-2] if len(self.plans) > 1 else None
        is_steady = (
            previous is not None
            and not plan.starts
            and np.array_equal(plan.groups, previous.groups)
            and np.array_equal(plan.spans, previous.spans + np.array([0, 1, 0, 0]))
            and bool((plan.spans[:, 2:] == 1).all())
        )
        assert is_steady or not plan.is_steady, "a plan that is not steady says it is"

    def _check_spans(self, spans: Sequence[_Span]) -> None:
        assert len({slot for slot, *_ in spans}) == len(spans), "a slot is in two spans"
        for number, start, num_tokens, samples in spans:
            slot, end = self._slots[number], start + num_tokens
            assert num_tokens > 0, "an empty span"
            assert slot.num_computed in (None, start), "a span that skips or repeats tokens"
            assert end <= len(slot.block_ids) * self.limits.block_size, "a span beyond its block table"
            assert end <= len(slot.token_ids), "a span beyond its tokens"
            assert samples == (end == len(slot.token_ids)), "a span draws exactly when it ends at the last token"
            assert len(slot.token_ids) + samples <= self.limits.max_model_len, "a sequence beyond the context"
            slot.num_computed = end

    def _check_groups(self, plan: StepPlan) -> None:
        """Members of a group are neighbours that share their first blocks, and compute nothing in them."""
        free_span = 0
        for first_span, num_spans, num_prefix_blocks in plan.groups.tolist():
            assert first_span >= free_span, "a span in two groups, or groups out of order"
            free_span = first_span + num_spans
            assert free_span <= len(plan.spans), "a group beyond the spans"
            assert num_spans >= self.limits.group_min_members > 0, "a group that is too small"
            assert num_prefix_blocks >= self.limits.group_min_blocks > 0, "a group that shares too little"
            assert self.limits.group_gain(num_spans, num_prefix_blocks) >= 0, "a group that costs more than it saves"
            members = plan.spans[first_span:free_span]
            assert (members[:, 1] >= num_prefix_blocks * self.limits.block_size).all(), "a member writes to its prefix"
            prefixes = {tuple(self._slots[slot].block_ids[:num_prefix_blocks]) for slot in members[:, 0].tolist()}
            assert len(prefixes) == 1, "a group without a common prefix"

    def _entry(self, slot: _Slot, position: int) -> int:
        block, offset = divmod(position, self.limits.block_size)
        return slot.block_ids[block] * self.limits.block_size + offset

    def _write_layer0(self, slot: _Slot, span: _Span) -> None:
        _, start, num_tokens, _ = span
        for position in range(start, start + num_tokens):
            self._layer0[self._entry(slot, position)] = hash((slot.token_ids[position], position))

    def _write_layer1(self, slot: _Slot, span: _Span) -> None:
        _, start, num_tokens, _ = span
        attended = 0
        for position in range(start + num_tokens):
            entry = self._entry(slot, position)
            assert self._layer0[entry] is not None, "a span reads keys and values that nobody wrote"
            attended = hash((attended, self._layer0[entry]))
            if position >= start:
                self._layer1[entry] = attended

    def _draw_all(self, step: int, slots: list[int]) -> StepResult:
        drawn = [self._draw(self._slots[slot]) for slot in slots]
        logprobs = {
            slot: fake_logprobs(token_id, self._slots[slot].start.sampling)
            for slot, (token_id, _) in zip(slots, drawn, strict=True)
            if self._slots[slot].start.sampling.logprobs is not None
        }
        return StepResult(
            step=step,
            slots=np.array(slots, dtype=np.int32),
            token_ids=np.array([token_id for token_id, _ in drawn], dtype=np.int32),
            is_stopped=np.array([is_stopped for _, is_stopped in drawn], dtype=bool),
            logprobs=logprobs,
        )

    def _draw(self, slot: _Slot) -> tuple[int, bool]:
        """The next token, and whether it ends the answer."""
        entries = [self._layer1[self._entry(slot, position)] for position in range(len(slot.token_ids))]
        start = slot.start
        num_generated = len(slot.token_ids) - start.num_prompt_tokens
        may_stop = num_generated >= start.sampling.min_tokens
        masked = () if may_stop else start.stop_token_ids
        seed = start.seed if start.sampling.temperature > 0 else 0
        token_id = _choose(hash((seed, *entries)), self.vocab_size, masked)
        slot.token_ids.append(token_id)
        return token_id, may_stop and token_id in start.stop_token_ids


def _choose(digest: int, vocab_size: int, masked: Collection[int]) -> int:
    """The first token at or after the digest's that is not masked."""
    return next(token for i in range(vocab_size) if (token := (digest + i) % vocab_size) not in masked)


def fake_logprobs(token_id: int, sampling: SamplingParams) -> TokenLogprobs:
    """What `FakeRunner` reports for a token: its own id as its logprob, and as many alternatives as asked for."""
    likeliest = range(token_id, token_id + (sampling.logprobs or 0))
    return TokenLogprobs(-float(token_id), [(other, -float(other)) for other in likeliest])


def fake_answer(
    prompt_token_ids: Sequence[int],
    sampling: SamplingParams,
    *,
    seed: int,
    stop_token_ids: Collection[int] = (),
    max_length: int,
    vocab_size: int = 64,
) -> list[int]:
    """The answer that `FakeRunner` gives to one prompt, computed without blocks, slots, steps or an engine.

    Args:
        prompt_token_ids: The prompt.
        sampling: `temperature`, `min_tokens` count.
        seed: The sequence's own, as in `SlotStart.seed`.
        stop_token_ids: Every id that ends the answer.
        max_length: Tokens, prompt and answer, at which the answer ends.
        vocab_size: As given to the runner.
    """
    token_ids, entries, attended = list(prompt_token_ids), [], 0
    num_prompt_tokens = len(token_ids)
    while len(token_ids) < max_length:
        for position in range(len(entries), len(token_ids)):
            attended = hash((attended, hash((token_ids[position], position))))
            entries.append(attended)
        may_stop = len(token_ids) - num_prompt_tokens >= sampling.min_tokens
        digest = hash((seed if sampling.temperature > 0 else 0, *entries))
        token_ids.append(_choose(digest, vocab_size, () if may_stop else stop_token_ids))
        if may_stop and token_ids[-1] in stop_token_ids:
            break
    return token_ids[num_prompt_tokens:]
