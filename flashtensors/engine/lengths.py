"""What the answers of a model turned out to be long, and so how long those that run will be."""

from __future__ import annotations

import numpy as np

WINDOW = 2048
"""Answers that are remembered."""

MIN_OBSERVATIONS = 32
"""Answers to have seen before any is expected to end ahead of its limit."""

MARGIN_DEVIATIONS = 0.25
"""Standard deviations that an expectation lies above the mean: what Tokasaurus found enough to seldom take back."""


class LengthStatistics:
    """Lengths of the latest answers, and the mean of those that became longer than a given number of tokens."""

    def __init__(self) -> None:
        self._ring = np.zeros(WINDOW, dtype=np.int64)
        self._num_seen = 0
        self._sorted: np.ndarray | None = None
        self._expected = np.zeros(0)

    def add(self, num_tokens: int) -> None:
        """Note an answer that ended."""
        self._ring[self._num_seen % WINDOW] = num_tokens
        self._num_seen += 1
        self._sorted = None

    @property
    def is_known(self) -> bool:
        """Whether enough was seen to expect an answer to end ahead of its limit."""
        return self._num_seen >= MIN_OBSERVATIONS

    def expect(self, num_generated: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Tokens that answers will have, given what is generated and what they may have at most.

        An answer that has outgrown all that was seen is expected to reach its limit.
        """
        if not self.is_known:
            return limits
        if self._sorted is None:
            self._summarise()
        assert self._sorted is not None
        first_longer = self._sorted.searchsorted(num_generated, side="right")
        return np.minimum(np.append(self._expected, np.iinfo(np.int64).max)[first_longer], limits)

    def expect_left(
        self, lengths: np.ndarray, num_prompt: np.ndarray, max_lengths: np.ndarray, can_stop: np.ndarray
    ) -> np.ndarray:
        """Tokens that sequences will still gain: up to their limit where nothing else can end their answers.

        Args:
            lengths: Tokens by now.
            num_prompt: Of these, the prompt's.
            max_lengths: At which an answer ends.
            can_stop: Whether it may end before.
        """
        limits = max_lengths - num_prompt
        return num_prompt + np.where(can_stop, self.expect(lengths - num_prompt, limits), limits) - lengths

    def _summarise(self) -> None:
        """For each rank in the sorted lengths, the mean of the rest and the margin above it."""
        self._sorted = np.sort(self._ring[: self._num_seen])
        counts = np.arange(len(self._sorted), 0, -1)
        means = self._sorted[::-1].cumsum()[::-1] / counts
        squares = np.square(self._sorted)[::-1].cumsum()[::-1] / counts
        deviations = np.sqrt(np.maximum(squares - np.square(means), 0.0))
        self._expected = np.ceil(means + MARGIN_DEVIATIONS * deviations).astype(np.int64)
