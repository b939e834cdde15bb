"""Decides what each step computes: who runs, who waits, who gives way.

Every plan is filled in this order until its token budget is spent:

1. one token for each running sequence that decodes, first come first. A sequence that needs a block when none is free
   takes it from the running sequence that ranks last, which goes back to waiting with all its tokens;
2. the rest of prompts that are being computed, and first chunks of sequences that leave the waiting queue, in rank
   order. The queue is strict: whoever does not fit yet is not passed by those behind it.

A sequence gets the blocks of all its known tokens when it is admitted, so only decoding can run out of blocks.
Whatever fits the pool alone always proceeds: the sequence that ranks first is never the one that gives way unless it
runs alone, and then all other blocks are free.
"""

from __future__ import annotations

from ..kvcache.prefix_cache import PrefixCache
from ..step import NUM_APPEND_COLUMNS, NUM_SPAN_COLUMNS, RunnerLimits, SlotStart, StepPlan, int_rows
from .ranked_queue import RankedQueue
from .sequence import Sequence, SequenceState


class Scheduler:
    """Queues, slots and blocks of one runner.

    Args:
        limits: What the runner holds.
        cache: The KV cache blocks.
    """

    def __init__(self, limits: RunnerLimits, cache: PrefixCache) -> None:
        self.limits = limits
        self.cache = cache
        self.waiting = RankedQueue()
        self.running = RankedQueue()
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._free_slots = list(reversed(range(limits.max_slots)))
        self._num_steps = 0
        self._draft = _Draft(0)

    def enqueue(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self.waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; its slot and blocks are free for the next plan.

        Steps in flight may still write to those blocks. They do so before any later plan reads or writes them.
        """
        if sequence.state is SequenceState.RUNNING:
            self._vacate(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def append_token(self, sequence: Sequence, token_id: int) -> None:
        """Learn the token that a step in flight drew for an unfinished sequence."""
        sequence.token_ids.append(token_id)
        sequence.num_pending -= 1
        if sequence.state is SequenceState.RUNNING:
            self._offer_prefix(sequence)

    def schedule(self) -> tuple[StepPlan, list[Sequence]] | None:
        """Plan the next step, as if all launched steps were done.

        Returns:
            The plan, and the sequences that it draws a token for, in the order of its spans; None when nothing can
            be computed before a step in flight is collected, or at all.
        """
        self._draft = draft = _Draft(self.limits.max_tokens_per_step)
        self._plan_decodes()
        for sequence in [s for s in self.running if s.num_uncomputed > 1]:
            self._admit(before=sequence)
            self._add_span(sequence)
        self._admit()
        if not draft.spans:
            return None
        plan = StepPlan(
            step=self._num_steps,
            starts=draft.starts,
            block_appends=int_rows(draft.block_appends, NUM_APPEND_COLUMNS),
            spans=int_rows(draft.spans, NUM_SPAN_COLUMNS),
        )
        self._num_steps += 1
        return plan, draft.drawing

    def _plan_decodes(self) -> None:
        """Pass 1. Those that give way rank last and are reached last, so none of them is in the plan yet."""
        position = 0
        while position < len(self.running) and self._draft.budget > 0:
            sequence = self.running[position]
            position += 1
            if sequence.num_uncomputed == 1 and not sequence.is_drawn_out and self._grow(sequence):
                self._add_span(sequence)

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token; False when `sequence` itself had to give way."""
        if sequence.num_computed < len(sequence.block_ids) * self.limits.block_size:
            return True
        while self.cache.pool.num_free == 0:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        block_id = self.cache.allocate()
        self._draft.block_appends.append((sequence.slot, len(sequence.block_ids), block_id))
        sequence.block_ids.append(block_id)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.state = SequenceState.WAITING
        self.waiting.add(sequence)
        self.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.cache.release(sequence.block_ids)
        sequence.slot, sequence.block_ids, sequence.num_computed, sequence.prefix = -1, [], 0, None

    def _admit(self, before: Sequence | None = None) -> None:
        """Move sequences from waiting to running while they fit; only those that rank ahead of `before`, if given."""
        while self._draft.budget > 0 and self.waiting and self._free_slots:
            sequence = self.waiting[0]
            if (before is not None and sequence.rank > before.rank) or not self._claim_blocks(sequence):
                return
            self.waiting.remove(sequence)
            sequence.state = SequenceState.RUNNING
            sequence.slot = self._free_slots.pop()
            self.running.add(sequence)
            self._draft.starts.append(sequence.slot_start())
            self._draft.block_appends += [(sequence.slot, i, block) for i, block in enumerate(sequence.block_ids)]
            self._add_span(sequence)

    def _claim_blocks(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, cached ones first; False when they are not to be had.

        Beside others that run, one block for each of them stays free, so that nobody gives way to a newcomer's
        prompt before it has grown by a block. A sequence whose tokens are not all known has to wait for them.
        """
        if sequence.num_pending > 0 or sequence.refused_at == self.cache.num_releases:
            return False
        nodes = self.cache.find(sequence.token_ids)
        num_new = -(-len(sequence.token_ids) // self.limits.block_size) - len(nodes)
        num_revived = sum(self.cache.pool.ref_counts[node.block_id] == 0 for node in nodes)
        if num_new + num_revived + len(self.running) > self.cache.pool.num_free:
            sequence.refused_at = self.cache.num_releases
            return False
        sequence.block_ids = self.cache.hold(nodes)
        sequence.block_ids += [self.cache.allocate() for _ in range(num_new)]
        sequence.prefix = nodes[-1] if nodes else self.cache.root
        sequence.num_prefix_blocks = len(nodes)
        sequence.num_computed = len(nodes) * self.limits.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
            self.prefix_queries += sequence.num_prompt_tokens
            self.prefix_hits += sequence.num_computed
        return True

    def _add_span(self, sequence: Sequence) -> None:
        draft = self._draft
        num_tokens = min(sequence.num_uncomputed, draft.budget)
        if num_tokens == 0:
            return
        is_drawing = num_tokens == sequence.num_uncomputed
        draft.spans.append((sequence.slot, sequence.num_computed, num_tokens, int(is_drawing)))
        draft.budget -= num_tokens
        sequence.num_computed += num_tokens
        if is_drawing:
            draft.drawing.append(sequence)
            sequence.num_pending += 1
        self._offer_prefix(sequence)

    def _offer_prefix(self, sequence: Sequence) -> None:
        """Make blocks findable whose tokens are all known and all computed by the plans up to this one."""
        size = self.limits.block_size
        end = (sequence.num_prefix_blocks + 1) * size
        while sequence.prefix is not None and end <= min(sequence.num_computed, len(sequence.token_ids)):
            token_ids = tuple(sequence.token_ids[end - size : end])
            block_id = sequence.block_ids[sequence.num_prefix_blocks]
            sequence.prefix = self.cache.insert(sequence.prefix, token_ids, block_id)
            sequence.num_prefix_blocks += 1
            end += size

    def check_invariants(self) -> None:
        """Recount everything from the sequences; for tests."""
        self.cache.check_invariants(sequence.block_ids for sequence in self.running)
        assert sorted([s.slot for s in self.running] + self._free_slots) == list(range(self.limits.max_slots))
        for queue, state in ((self.waiting, SequenceState.WAITING), (self.running, SequenceState.RUNNING)):
            ranks = [sequence.rank for sequence in queue]
            assert ranks == sorted(set(ranks)), f"{state} is not sorted"
            assert all(sequence.state is state for sequence in queue), f"{state} has strangers"
        for sequence in self.waiting:
            assert not sequence.block_ids, "a waiting sequence holds blocks"
        for sequence in self.running:
            room = len(sequence.block_ids) * self.limits.block_size
            assert sequence.num_computed <= min(room, sequence.length), "computed tokens without room or cause"
            assert sequence.length <= sequence.max_length, "a sequence outgrew its length"


class _Draft:
    """A plan in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.starts: list[SlotStart] = []
        self.block_appends: list[tuple[int, int, int]] = []
        self.spans: list[tuple[int, int, int, int]] = []
        self.drawing: list[Sequence] = []
