"""Running sequences as arrays by slot, so that a step costs array operations and not a loop over sequences.

Shapes: N slots, B blocks of the longest block table, W generated tokens that wait to be gathered, R rows of a result.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..request import TokenLogprobs
from ..step import RunnerLimits
from .sequence import Sequence, SequenceState

FRESH_TOKENS = 512
"""Generated tokens that a slot takes before they move to their sequence's list."""

_NEVER_S = -1.0e30


class Batch:
    """What the engine knows of each slot, and where the tokens of steps in flight belong.

    A slot that changes hands gets a new *epoch*: a result for (slot, epoch) never reaches the slot's next sequence.
    """

    def __init__(self, limits: RunnerLimits) -> None:
        num_slots = limits.max_slots
        self._sequences: list[Sequence | None] = [None] * num_slots
        self.num_changes = 0
        """Times that a sequence took or left a slot."""
        self.num_generated = 0
        """Tokens learnt, of all sequences ever."""
        self.epochs_N = np.zeros(num_slots, dtype=np.int64)
        self.lengths_N = np.zeros(num_slots, dtype=np.int64)
        """Tokens, known or drawn by steps in flight."""
        self.num_known_N = np.zeros(num_slots, dtype=np.int64)
        self.num_computed_N = np.zeros(num_slots, dtype=np.int64)
        """Tokens whose keys and values are in the cache once every launched step is done."""
        self.num_prompt_tokens_N = np.zeros(num_slots, dtype=np.int64)
        self.max_lengths_N = np.zeros(num_slots, dtype=np.int64)
        self.can_stop_N = np.zeros(num_slots, dtype=bool)
        """Whether anything but its length may end the slot's answer."""
        self.num_blocks_N = np.zeros(num_slots, dtype=np.int64)
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self.tables_NB = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.is_streamed_N = np.zeros(num_slots, dtype=bool)
        self.sent_s_N = np.full(num_slots, _NEVER_S)
        """When the slot's sequence last handed out tokens; long ago when it has not yet."""
        self.num_sent_N = np.zeros(num_slots, dtype=np.int64)
        """Tokens that need not be handed out any more: the prompt's, and those that were."""
        self._num_gathered_N = np.zeros(num_slots, dtype=np.int64)
        self._fresh_NW = np.zeros((num_slots, FRESH_TOKENS), dtype=np.int32)
        self._absent: dict[tuple[int, int], Sequence] = {}
        self._free_slots = list(reversed(range(num_slots)))

    @property
    def num_free_slots(self) -> int:
        """Slots without a sequence."""
        return len(self._free_slots)

    def sequence(self, slot: int) -> Sequence:
        """Who is in a slot."""
        sequence = self._sequences[slot]
        assert sequence is not None, f"nobody is in slot {slot}"
        return sequence

    def seat(self, sequence: Sequence, block_ids: list[int], num_computed: int) -> None:
        """Give a sequence, all of whose tokens are known, a free slot and its blocks."""
        slot = sequence.slot = self._free_slots.pop()
        self._sequences[slot] = sequence
        self.num_changes += 1
        self.epochs_N[slot] += 1
        self.lengths_N[slot] = self.num_known_N[slot] = self._num_gathered_N[slot] = len(sequence.token_ids)
        self.num_computed_N[slot] = num_computed
        self.num_prompt_tokens_N[slot] = sequence.num_prompt_tokens
        self.max_lengths_N[slot] = sequence.max_length
        self.can_stop_N[slot] = sequence.can_stop
        self.num_blocks_N[slot] = len(block_ids)
        self.tables_NB[slot, : len(block_ids)] = block_ids
        self.is_streamed_N[slot] = sequence.is_streamed
        self.sent_s_N[slot] = _NEVER_S
        self.num_sent_N[slot] = sequence.num_prompt_tokens + sequence.num_reported

    def unseat(self, sequence: Sequence, state: SequenceState) -> None:
        """Take a sequence from its slot. Tokens of steps in flight still reach one that goes on waiting."""
        slot = sequence.slot
        self.gather(slot)
        sequence.num_pending = int(self.lengths_N[slot] - self.num_known_N[slot])
        if state is SequenceState.WAITING and sequence.num_pending > 0:
            self._absent[slot, int(self.epochs_N[slot])] = sequence
        sequence.slot, sequence.state = -1, state
        self._sequences[slot] = None
        self.num_changes += 1
        self.epochs_N[slot] += 1
        self.lengths_N[slot] = self.num_computed_N[slot] = 0
        self._free_slots.append(slot)

    def block_ids(self, slot: int) -> list[int]:
        """The slot's block table."""
        return self.tables_NB[slot, : self.num_blocks_N[slot]].tolist()

    def append_block(self, slot: int, block_id: int) -> int:
        """Grow the slot's block table; returns the new block's index in it."""
        index = int(self.num_blocks_N[slot])
        self.tables_NB[slot, index] = block_id
        self.num_blocks_N[slot] = index + 1
        return index

    def advance_decoding(self, slots_S: np.ndarray) -> None:
        """Count a token that is computed and one that is drawn for each of these slots."""
        self.num_computed_N[slots_S] += 1
        self.lengths_N[slots_S] += 1

    def advance(self, spans: Iterable[tuple[int, int, int, int]]) -> None:
        """Count the tokens that spans of a plan compute and draw."""
        for slot, _, num_tokens, samples in spans:
            self.num_computed_N[slot] += num_tokens
            self.lengths_N[slot] += samples

    def take_tokens(self, slots_R: np.ndarray, token_ids_R: np.ndarray) -> np.ndarray:
        """Learn one token of each of these slots; returns how many each of them knows now."""
        num_known_R = self.num_known_N[slots_R]
        num_fresh_R = num_known_R - self._num_gathered_N[slots_R]
        self._fresh_NW[slots_R, num_fresh_R] = token_ids_R
        num_known_R += 1
        self.num_known_N[slots_R] = num_known_R
        self.num_generated += len(slots_R)
        if num_fresh_R.max(initial=0) == FRESH_TOKENS - 1:
            for slot in slots_R[num_fresh_R == FRESH_TOKENS - 1].tolist():
                self.gather(slot)
        return num_known_R

    def take_absent(self, slot: int, epoch: int) -> Sequence | None:
        """The sequence that left this slot in this epoch and waits, for the last time; None when it has ended since."""
        sequence = self._absent.pop((slot, epoch), None)
        return None if sequence is None or sequence.state is SequenceState.FINISHED else sequence

    def take_absent_token(
        self, slot: int, epoch: int, token_id: int, logprobs: TokenLogprobs | None
    ) -> Sequence | None:
        """Learn a token of a sequence that has left its slot; None when it has ended since."""
        sequence = self._absent.get((slot, epoch))
        if sequence is None:
            return None
        sequence.num_pending -= 1
        if sequence.num_pending == 0 or sequence.state is SequenceState.FINISHED:
            del self._absent[slot, epoch]
        if sequence.state is SequenceState.FINISHED:
            return None
        sequence.token_ids.append(token_id)
        self.num_generated += 1
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        return sequence

    def gather(self, slot: int) -> None:
        """Move the slot's generated tokens to its sequence's list."""
        sequence, num_known = self.sequence(slot), self.num_known_N[slot]
        sequence.token_ids += self._fresh_NW[slot, : num_known - self._num_gathered_N[slot]].tolist()
        self._num_gathered_N[slot] = num_known
