"""Decides what each step computes: who runs, who waits, who gives way.

Every plan is filled in this order until its token budget is spent:

1. one token for each running sequence that decodes, first come first. When they need more blocks than are free, the
   running sequence that ranks last goes back to waiting with all its tokens, until the others have enough;
2. the rest of prompts that are being computed, and first chunks of sequences that leave the waiting queue, in rank
   order. The queue is strict: whoever does not fit yet is not passed by those behind it. Prompts of batch work are
   spread over steps where that costs nothing (`pace`).

A sequence is admitted when a forecast says that all who run will find their blocks (`admission`), and then gets those
of all its known tokens, so only decoding can run out of blocks. Batch work gives way to a better priority that finds no
room. Whatever fits the pool alone always proceeds: the sequence that ranks first is never the one that gives way unless
it runs alone, and then all other blocks are free.

A step in which nobody comes or goes costs a fixed number of array operations, and a few more for each new block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..kvcache.prefix_cache import PrefixCache, PrefixNode
from ..step import NUM_APPEND_COLUMNS, NUM_SPAN_COLUMNS, RunnerLimits, SlotStart, StepPlan, int_rows
from .admission import Admission
from .batch import Batch
from .lengths import LengthStatistics
from .pace import Pace
from .ranked_queue import RankedQueue
from .sequence import Sequence, SequenceState
from .span_order import SpanOrder
from .turns import preferred


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    budget: int
    batch_budget: int = 0
    """Of these tokens, those that prompts of batch work may take."""
    starts: list[SlotStart] = field(default_factory=list)
    block_appends: list[tuple[int, int, int]] = field(default_factory=list)
    decoding: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    is_repeated: bool = False
    """Whether those who run are those of the last plan, and all of them decoded then and decode now."""
    prompts: list[tuple[int, int, int, int]] = field(default_factory=list)

    def spans(self, num_computed_N: np.ndarray) -> np.ndarray:
        """Decoding slots first, then prompts."""
        spans = np.ones((len(self.decoding), NUM_SPAN_COLUMNS), dtype=np.int32)
        spans[:, 0] = self.decoding
        spans[:, 1] = num_computed_N[self.decoding]
        return np.concatenate([spans, int_rows(self.prompts, NUM_SPAN_COLUMNS)]) if self.prompts else spans


class Scheduler:
    """Queues, slots and blocks of one runner.

    Args:
        limits: What the runner holds.
        cache: The KV cache blocks.
    """

    def __init__(self, limits: RunnerLimits, cache: PrefixCache) -> None:
        self.limits = limits
        self.cache = cache
        self.batch = Batch(limits)
        self.lengths = LengthStatistics()
        self.admission = Admission(limits, cache, self.batch, self.lengths)
        self.pace = Pace(limits, self.batch, self.lengths)
        self.waiting = RankedQueue()
        self.running = RankedQueue()
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._preempted: list[Sequence] = []
        self._span_order = SpanOrder(limits, self.batch, cache.pool)
        self.running_slots = np.zeros(0, dtype=np.int64)
        """Slots of all running sequences, in rank order."""
        self._num_steps = 0
        self._num_changes_seen = -1
        """`Batch.num_changes` when last all who ran were decoding."""
        self._repeated_until = 0
        """The step from which on one of these may have its longest answer."""
        self._draft = _Draft(0)

    def enqueue(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self.waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; its slot and blocks are free for the next plan.

        Steps in flight may still write to those blocks. They do so before any later plan reads or writes them.
        """
        if sequence.state is SequenceState.RUNNING:
            self._vacate(sequence, SequenceState.FINISHED)
        else:
            self.waiting.remove(sequence)
            sequence.state = SequenceState.FINISHED

    def schedule(self) -> StepPlan | None:
        """Plan the next step, as if all launched steps were done.

        None when nothing can be computed before a step in flight is collected, or at all.
        """
        self._draft = draft = _Draft(self.limits.max_tokens_per_step)
        self._make_way()
        self._plan_decodes()
        self._plan_prompts()
        if len(draft.decoding) + len(draft.prompts) == 0:
            return None
        if draft.is_repeated and self.batch.num_changes == self._num_changes_seen:
            spans, groups, is_steady = self._span_order.repeat()
        else:
            spans = draft.spans(self.batch.num_computed_N)
            spans, groups, is_steady = self._span_order.arrange(spans, has_starts=bool(draft.starts))
        self.batch.advance_decoding(draft.decoding)
        self.batch.advance(draft.prompts)
        plan = StepPlan(
            step=self._num_steps,
            starts=draft.starts,
            block_appends=int_rows(draft.block_appends, NUM_APPEND_COLUMNS),
            spans=spans,
            groups=groups,
            is_steady=is_steady,
        )
        self._num_steps += 1
        return plan

    def take_preempted(self) -> list[Sequence]:
        """Sequences that gave way since the last call; some may run again, or have ended."""
        preempted, self._preempted = self._preempted, []
        return preempted

    def _make_way(self) -> None:
        """Let batch work give way to the first that waits, where that has a better priority and finds no room."""
        while self.waiting and self.running:
            first, last = self.waiting[0], self.running[-1]
            if first.priority >= last.priority or first.rank > last.rank or first.num_pending > 0:
                return
            if self.batch.num_free_slots and self.admission.find_room(first, self.running_slots) is not None:
                return
            self._preempt(last)

    def _plan_decodes(self) -> None:
        """Pass 1."""
        batch, draft = self.batch, self._draft
        slots = self._find_decoding()[: draft.budget]
        while True:
            is_full = batch.num_computed_N[slots] >= batch.num_blocks_N[slots] * self.limits.block_size
            growing = slots[is_full].tolist()
            if len(growing) <= self.cache.pool.num_free:
                break
            last = self.running[-1]
            slots = slots[slots != last.slot]
            self._preempt(last)
        for slot in growing:
            block_id = self.cache.allocate()
            draft.block_appends.append((slot, batch.append_block(slot, block_id), block_id))
        draft.decoding = slots
        draft.budget -= len(slots)

    def _find_decoding(self) -> np.ndarray:
        """Slots whose next token can be drawn, in rank order.

        Where they are all, they stay so until somebody comes or goes or the first answer has its full length.
        """
        batch, slots = self.batch, self.running_slots
        if batch.num_changes == self._num_changes_seen and self._num_steps < self._repeated_until:
            self._draft.is_repeated = True
            return slots
        lengths = batch.lengths_N[slots]
        num_left = batch.max_lengths_N[slots] - lengths
        is_decoding = (lengths - batch.num_computed_N[slots] == 1) & (num_left > 0)
        if len(slots) and is_decoding.all():
            self._num_changes_seen, self._repeated_until = batch.num_changes, self._num_steps + int(num_left.min())
        return slots[is_decoding]

    def _plan_prompts(self) -> None:
        """Pass 2."""
        batch, draft = self.batch, self._draft
        slots = self.running_slots
        has_chats = self.waiting.num_interactive + self.running.num_interactive > 0
        draft.batch_budget = self.pace.num_prompt_tokens(self.waiting, slots, len(draft.decoding), has_chats=has_chats)
        if not draft.is_repeated:
            unfinished = slots[batch.lengths_N[slots] - batch.num_computed_N[slots] > 1]
            for sequence in [batch.sequence(slot) for slot in unfinished.tolist()]:
                self._admit(before=sequence)
                self._add_prompt_span(sequence)
        self._admit()

    def _admit(self, before: Sequence | None = None) -> None:
        """Move sequences from waiting to running while they fit; only those that rank ahead of `before`, if given."""
        while self._draft.budget > 0 and self.waiting and self.batch.num_free_slots:
            sequence = self.waiting[0]
            if before is not None and sequence.rank > before.rank:
                return
            if sequence.is_batch and self._draft.batch_budget <= 0:
                return
            nodes = self.admission.find_room(sequence, self.running_slots)
            if nodes is None:
                return
            self.waiting.remove(sequence)
            self._seat(sequence, nodes)
            self._add_prompt_span(sequence)

    def _seat(self, sequence: Sequence, nodes: list[PrefixNode]) -> None:
        """Give a sequence a slot and the blocks of all its tokens, those of `nodes` first."""
        num_cached = len(nodes) * self.limits.block_size
        num_new = -(-len(sequence.token_ids) // self.limits.block_size) - len(nodes)
        block_ids = self.cache.hold(nodes)
        block_ids += [self.cache.allocate() for _ in range(num_new)]
        sequence.prefix = nodes[-1] if nodes else self.cache.root
        sequence.num_prefix_blocks = len(nodes)
        sequence.state = SequenceState.RUNNING
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_cached
            self.prefix_queries += sequence.num_prompt_tokens
            self.prefix_hits += num_cached
        self.batch.seat(sequence, block_ids, num_cached)
        self.admission.add(sequence)
        self.running_slots = _insert(self.running_slots, self.running.add(sequence), sequence.slot)
        self._draft.starts.append(sequence.slot_start())
        self._draft.block_appends += [(sequence.slot, index, block_id) for index, block_id in enumerate(block_ids)]

    def _add_prompt_span(self, sequence: Sequence) -> None:
        slot = sequence.slot
        start = int(self.batch.num_computed_N[slot])
        num_uncomputed = int(self.batch.lengths_N[slot]) - start
        draft = self._draft
        num_tokens = min(num_uncomputed, draft.budget, draft.batch_budget if sequence.is_batch else draft.budget)
        if num_tokens > 0:
            draft.prompts.append((slot, start, num_tokens, int(num_tokens == num_uncomputed)))
            draft.budget -= num_tokens
            draft.batch_budget -= num_tokens if sequence.is_batch else 0
            self._offer_prefix(slot, num_computed=start + num_tokens)

    def _preempt(self, sequence: Sequence) -> None:
        self._vacate(sequence, SequenceState.WAITING)
        sequence.rank = preferred(sequence.rank)
        self.waiting.add(sequence)
        self.num_preemptions += 1
        self._preempted.append(sequence)

    def _vacate(self, sequence: Sequence, state: SequenceState) -> None:
        slot = sequence.slot
        self.batch.gather(slot)
        self._offer_prefix(slot, num_computed=int(self.batch.num_computed_N[slot]))
        self.admission.remove(sequence)
        position = self.running.remove(sequence)
        self.running_slots = np.concatenate([self.running_slots[:position], self.running_slots[position + 1 :]])
        self.cache.release(self.batch.block_ids(slot))
        self.batch.unseat(sequence, state)
        sequence.prefix = None

    def _offer_prefix(self, slot: int, *, num_computed: int) -> None:
        """Make blocks findable whose tokens are all gathered and all computed by the plans up to this one.

        Of an answer, they are offered when it leaves its slot; of a prompt, with every chunk.
        """
        sequence, size = self.batch.sequence(slot), self.limits.block_size
        end = (sequence.num_prefix_blocks + 1) * size
        while sequence.prefix is not None and end <= min(num_computed, len(sequence.token_ids)):
            token_ids = tuple(sequence.token_ids[end - size : end])
            block_id = int(self.batch.tables_NB[slot, sequence.num_prefix_blocks])
            sequence.prefix = self.cache.insert(sequence.prefix, token_ids, block_id)
            sequence.num_prefix_blocks += 1
            end += size

    def check_invariants(self) -> None:
        """Recount everything from the sequences; for tests."""
        batch, size = self.batch, self.limits.block_size
        self.cache.check_invariants(batch.block_ids(sequence.slot) for sequence in self.running)
        slots = [sequence.slot for sequence in self.running]
        assert slots == self.running_slots.tolist(), "the order of slots drifted"
        assert len(set(slots)) == len(slots) == self.limits.max_slots - batch.num_free_slots, "slots drifted"
        for queue, state in ((self.waiting, SequenceState.WAITING), (self.running, SequenceState.RUNNING)):
            ranks = [sequence.rank for sequence in queue]
            assert ranks == sorted(set(ranks)), f"{state} is not sorted"
            assert all(sequence.state is state for sequence in queue), f"{state} has strangers"
        for sequence in self.running:
            slot = sequence.slot
            assert batch.sequence(slot) is sequence, "two sequences claim a slot"
            assert batch.num_computed_N[slot] <= batch.num_blocks_N[slot] * size, "computed tokens without room"
            assert batch.num_computed_N[slot] <= batch.lengths_N[slot] <= sequence.max_length, "an impossible length"


def _insert(slots: np.ndarray, position: int, slot: int) -> np.ndarray:
    return np.concatenate([slots[:position], [slot], slots[position:]])
