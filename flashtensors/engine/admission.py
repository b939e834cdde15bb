"""Whether a sequence that waits may run beside those that do: blocks now, and blocks until all of them have ended."""

from __future__ import annotations

from collections.abc import Iterable

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

    Shapes: S running sequences, and the one that would join them.

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
        num_coming = num_new + num_revived
        if num_coming <= self._cache.pool.num_free and self._fits_later(sequence, nodes, num_coming, running_S):
            return nodes
        sequence.refused_at = self._cache.num_changes
        return None

    def peak_blocks(
        self, running_S: np.ndarray, newcomer: Sequence | None = None, nodes: Iterable[PrefixNode] = ()
    ) -> int:
        """Most blocks that are expected to be held, from the step that is planned now until all have ended.

        Args:
            running_S: Slots, in the order in which their prompts are computed.
            newcomer: A sequence that would begin to run now, after them.
            nodes: The cached prefix that it would begin with.
        """
        batch, size = self._batch, self._limits.block_size
        columns = [
            batch.lengths_N[running_S],
            batch.num_computed_N[running_S],
            batch.num_prompt_tokens_N[running_S],
            batch.max_lengths_N[running_S],
            batch.can_stop_N[running_S],
        ]
        node_ids = [node.block_id for node in nodes]
        if newcomer is not None:
            facts = (len(newcomer.token_ids), len(node_ids) * size, newcomer.num_prompt_tokens, newcomer.max_length)
            columns = [
                np.append(column, fact) for column, fact in zip(columns, (*facts, newcomer.can_stop), strict=True)
            ]
        lengths, ends = self._outlook(*columns)
        offsets = np.zeros(len(lengths), dtype=np.int64)
        if self._cache.pool.num_shared or node_ids:
            tables, num_held = self._tables(running_S, None if newcomer is None else node_ids)
            offsets = count_lasting_blocks(tables, num_held, ends, self._limits.num_blocks) - num_held
        return peak_usage(lengths, ends, offsets, size)

    def _fits_later(self, sequence: Sequence, nodes: list[PrefixNode], num_coming: int, running_S: np.ndarray) -> bool:
        """A forecast, half a millisecond for 1,024 sequences, is made where all may ask for more than is free."""
        num_growing = self._num_committed - int(self._batch.num_blocks_N[running_S].sum())
        num_growing += self._most_blocks(sequence) - self._num_blocks(len(sequence.token_ids))
        if len(running_S) == 0 or num_growing + num_coming <= self._cache.pool.num_free:
            return True
        return self.peak_blocks(running_S, sequence, nodes) <= self._limits.num_blocks

    def _outlook(
        self,
        lengths_S: np.ndarray,
        num_computed_S: np.ndarray,
        num_prompt_S: np.ndarray,
        max_lengths_S: np.ndarray,
        can_stop_S: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens computed after the step that is planned now, and the last step in which blocks are held.

        A prompt that takes several steps counts as if its answer grew from the first of them on.
        """
        lengths_S = np.minimum(lengths_S, max_lengths_S - 1)  # the last token of an answer is never computed
        num_left_S = self._lengths.expect_left(lengths_S, num_prompt_S, max_lengths_S, can_stop_S) - 1
        num_uncomputed_S = lengths_S - num_computed_S
        is_prompt_S = num_uncomputed_S > 1
        prompt_rate = max(self._limits.max_tokens_per_step - int((~is_prompt_S).sum()), 1)
        num_ahead_S = np.where(is_prompt_S, num_uncomputed_S, 0).cumsum()
        delays_S = np.where(is_prompt_S, (num_ahead_S - 1) // prompt_rate, 0)
        num_unheard = self._limits.max_steps_in_flight - 1  # steps planned before an end is known
        return lengths_S, np.maximum(num_left_S + delays_S, 0) + num_unheard

    def _tables(self, running_S: np.ndarray, last: list[int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Block tables, and the blocks in each; `last`, if given, is one more."""
        num_held = self._batch.num_blocks_N[running_S]
        if last is None:
            return self._batch.tables_NB[running_S, : int(num_held.max(initial=0))], num_held
        num_held = np.append(num_held, len(last))
        tables = np.zeros((len(num_held), int(num_held.max())), dtype=np.int32)
        tables[:-1] = self._batch.tables_NB[running_S, : tables.shape[1]]
        tables[-1, : len(last)] = last
        return tables, num_held

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)

    def _most_blocks(self, sequence: Sequence) -> int:
        return self._num_blocks(sequence.max_length - 1)
