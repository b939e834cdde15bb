"""Sequences in order of service."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from .sequence import Sequence
from .turns import Rank


class RankedQueue:
    """Sequences sorted by rank, the first to be served in front."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self.num_interactive = 0
        """Those that are no batch work."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __getitem__(self, position: int) -> Sequence:
        return self._sequences[position]

    def add(self, sequence: Sequence) -> int:
        """Put a sequence in its place; returns its position."""
        position = bisect_left(self._sequences, sequence.rank, key=_rank)
        self._sequences.insert(position, sequence)
        self.num_interactive += not sequence.is_batch
        return position

    def remove(self, sequence: Sequence) -> int:
        """Take a sequence out, which has to be in; returns where it was."""
        position = bisect_left(self._sequences, sequence.rank, key=_rank)
        assert self._sequences[position] is sequence, "a sequence is not where its rank says"
        del self._sequences[position]
        self.num_interactive -= not sequence.is_batch
        return position


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
