"""Whether a sequence that waits may run beside those that do: blocks now, and blocks until all of them have ended."""

from __future__ import annotations

import numpy as np

from ..kvcache.prefix_cache import PrefixCache, PrefixNode
from ..step import RunnerLimits
from .batch import Batch
from .forecast import count_lasting_blocks, peak_usage
from .lengths import LengthStatistics
from .sequence import Sequence


class Admission:
    """Looks ahead. A sequence may run when the peak of all blocks that will be held is within the cache.

    Answers that can stop are expected to be as long as answers turned out to be; a forecast may therefore be wrong, and
    somebody may have to give way. Answers that cannot stop never make it wrong.

    Args:
        limits: What the runner holds.
        cache: The KV cache blocks.
        batch: The running sequences.
        lengths: Of answers that have ended.
    """

    def __init__(self, limits: RunnerLimits, cache: PrefixCache, batch: Batch, lengths: LengthStatistics) -> None:
        self._limits = limits
        self._cache = cache
        self._batch = batch
        self._lengths = lengths
        self._num_committed = 0

    def add(self, sequence: Sequence) -> None:
        """Count a sequence that begins to run."""
        self._num_committed += self._most_blocks(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Count a sequence that no longer runs."""
        self._num_committed -= self._most_blocks(sequence)

    def find_room(self, sequence: Sequence, running_S: np.ndarray) -> list[PrefixNode] | None:
        """The cached prefix that a waiting sequence would begin with; None when it has to go on waiting.

        A sequence whose tokens are not all known has to wait for them.

        Args:
            sequence: It gets the blocks of all its known tokens at once.
            running_S: Slots of those that run, in the order in which their prompts are computed.
        """
        if sequence.num_pending > 0 or sequence.refused_at == self._cache.num_changes:
            return None
        nodes = self._cache.find(sequence.token_ids)
        num_new = self._num_blocks(len(sequence.token_ids)) - len(nodes)
        num_revived = sum(self._cache.pool.ref_counts[node.block_id] == 0 for node in nodes)
        fits_now = num_new + num_revived <= self._cache.pool.num_free
        if fits_now and self._fits_later(sequence, nodes, running_S):
            return nodes
        sequence.refused_at = self._cache.num_changes
        return None

    def peak_blocks(self, running_S: np.ndarray) -> int:
        """Most blocks that these slots are expected to hold, from the step that is planned now until they are done."""
        lengths, ends = self._outlook(running_S)
        tables = [self._batch.tables_NB[slot, : self._batch.num_blocks_N[slot]] for slot in running_S.tolist()]
        offsets = self._offsets(tables, ends) if tables else np.zeros(0, dtype=np.int64)
        return peak_usage(lengths, ends, offsets, self._limits.block_size)

    def _fits_later(self, sequence: Sequence, nodes: list[PrefixNode], running_S: np.ndarray) -> bool:
        num_blocks = self._limits.num_blocks
        if len(running_S) == 0 or self._num_committed + self._most_blocks(sequence) <= num_blocks:
            return True
        lengths, ends = self._outlook(running_S)
        num_known = len(sequence.token_ids)
        num_uncomputed = num_known - len(nodes) * self._limits.block_size
        end = self._expected_end(sequence) + self._delay(running_S, num_uncomputed)
        lengths, ends = np.append(lengths, num_known), np.append(ends, end)
        if self._cache.pool.num_shared == 0 and not nodes:
            offsets = np.zeros(len(ends), dtype=np.int64)
        else:
            tables = [self._batch.tables_NB[slot, : self._batch.num_blocks_N[slot]] for slot in running_S.tolist()]
            tables.append(np.array([node.block_id for node in nodes], dtype=np.int32))
            offsets = self._offsets(tables, ends)
        return peak_usage(lengths, ends, offsets, self._limits.block_size) <= num_blocks

    def _outlook(self, running_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens computed after the step that is planned now, and the last step in which blocks are held."""
        batch = self._batch
        max_lengths, num_prompt = batch.max_lengths_N[running_S], batch.num_prompt_tokens_N[running_S]
        lengths = np.minimum(batch.lengths_N[running_S], max_lengths - 1)
        limits = max_lengths - num_prompt
        expected = self._lengths.expect(lengths - num_prompt, limits)
        totals = num_prompt + np.where(batch.can_stop_N[running_S], expected, limits)
        num_uncomputed = lengths - batch.num_computed_N[running_S]
        is_prompt = num_uncomputed > 1
        num_ahead = np.where(is_prompt, num_uncomputed, 0).cumsum()
        delays = np.where(is_prompt, -(-num_ahead // self._prompt_rate(is_prompt)) - 1, 0)
        ends = totals - 1 - lengths + delays + self._limits.max_steps_in_flight - 1
        return lengths, np.maximum(ends, 0)

    def _expected_end(self, sequence: Sequence) -> int:
        num_generated, limit = sequence.num_generated, sequence.max_length - sequence.num_prompt_tokens
        expected = limit
        if sequence.can_stop:
            expected = int(self._lengths.expect(np.array([num_generated]), np.array([limit]))[0])
        return max(expected - num_generated - 1, 0) + self._limits.max_steps_in_flight - 1

    def _delay(self, running_S: np.ndarray, num_tokens: int) -> int:
        """Steps that pass before the last chunk of a prompt is computed, when it comes after all others."""
        num_uncomputed = self._batch.lengths_N[running_S] - self._batch.num_computed_N[running_S]
        is_prompt = num_uncomputed > 1
        num_ahead = int(num_uncomputed[is_prompt].sum()) + num_tokens
        return max(-(-num_ahead // self._prompt_rate(is_prompt)) - 1, 0)

    def _prompt_rate(self, is_prompt_S: np.ndarray) -> int:
        """Prompt tokens that a step computes beside those that decode."""
        return max(self._limits.max_tokens_per_step - int((~is_prompt_S).sum()), 1)

    def _offsets(self, tables: list[np.ndarray], ends: np.ndarray) -> np.ndarray:
        num_lasting = count_lasting_blocks(tables, ends, self._limits.num_blocks)
        return num_lasting - np.array([len(table) for table in tables])

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)

    def _most_blocks(self, sequence: Sequence) -> int:
        """The last token of an answer is never computed."""
        return self._num_blocks(sequence.max_length - 1)
