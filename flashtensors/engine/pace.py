"""How quickly to begin with the prompts of batch work, so that no step reads the weights for a few rows alone.

A batch ends when its longest answer does, however early the short ones began. To compute all prompts first makes steps
that are bound by arithmetic, and leaves a tail of steps that read all weights for the few answers that are still
growing. A prompt that is spread over the steps of longer answers costs next to nothing there: their products wait for
memory. (To let prompts ride along is the idea of Sarathi-Serve, arXiv 2403.02310, which does it for latency.)

Answers of at most l tokens must begin T - l steps from now at the latest, where T is the steps that the longest answer
of all is expected to take: prompts are computed at least as quickly as keeps these dates. More of them are where a step
would have fewer tokens than it has on average until the end. So answers that are all of one length begin at once, those
that may stop early wait only if they are short at any rate, and the number of steps does not grow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..step import RunnerLimits
from .batch import Batch
from .lengths import LengthStatistics
from .ranked_queue import RankedQueue

MIN_TOKENS = 256
"""Tokens with which a step's products are bound by arithmetic, not by reading weights: 175 on an H200 in bf16."""

MIN_CHUNK = 160
"""Fewest prompt tokens that are worth a step with kernels for prompts."""

ROW_TILE = 128
"""Steps with prompts are filled up to a multiple of it: 416 rows of a matrix product take as long as 512.

On an H200, µs of all products of Qwen3-8B by rows: 256 5,500, 288 6,390, 320 6,550, 384 7,570, 416 9,700, 512 9,610.
With 150 sequences that decode beside them and what the kernels for prompts take, a prompt token costs 13 to 15 µs in
steps of 256 to 512 rows and 17 in those of 1,024; 3.3, 1.5 and 1.3 µs of Qwen3-0.6B in steps of 290, 512 and 1,024.
"""

TOKENS_BESIDE_CHATS = 512
"""Tokens of a step up to which prompts of batch work join a chat: enough for products at their full rate, and a chat's
next token comes after 12 ms of an 8B model on an H200, not after the 200 ms of a step of 8,192."""

STEPS_BETWEEN = 16
"""Steps before the pace is worked out again."""


def _whole_tiles(num_tokens: int) -> int:
    """The most rows up to `num_tokens` of which a step computes none in vain; more rows are rounded more coarsely."""
    tile = max(ROW_TILE, (1 << num_tokens.bit_length()) // 16)
    return num_tokens // tile * tile


@dataclass(frozen=True, slots=True)
class _Rate:
    """Tokens of a step, and how many of them must be of prompts."""

    num_tokens: float
    num_prompt_tokens: float
    num_due: int
    """Prompt tokens that are due before the rate is worked out again; they come at once."""


class Pace:
    """Says how many prompt tokens of batch work the next step should compute.

    Beside a chat, few enough that its next token does not come late. With batch work alone, a pace is kept while all
    that waits has room at once and while it is known how long answers will be; else as many as there is room for.

    Shapes: S running sequences, W waiting ones.
    """

    def __init__(self, limits: RunnerLimits, batch: Batch, lengths: LengthStatistics) -> None:
        self._limits = limits
        self._batch = batch
        self._lengths = lengths
        self._rate: _Rate | None = None
        self._num_steps_left = 0
        self._credit = 0.0

    def num_prompt_tokens(
        self, waiting: RankedQueue, running_S: np.ndarray, num_decoding: int, *, has_chats: bool
    ) -> int:
        """Most prompt tokens of batch work in the step that is planned now.

        Args:
            waiting: Who waits.
            running_S: Slots of those that run, in rank order.
            num_decoding: Tokens of answers in this step.
            has_chats: Whether anybody waits or runs who is no batch work.
        """
        most = self._limits.max_tokens_per_step
        if has_chats or not waiting or len(waiting) > self._batch.num_free_slots:
            self._num_steps_left = 0
            return min(most, max(TOKENS_BESIDE_CHATS - num_decoding, ROW_TILE)) if has_chats else most
        if self._num_steps_left == 0:
            self._rate, self._num_steps_left = self._find_rate(waiting, running_S), STEPS_BETWEEN
            self._credit = min(self._credit, ROW_TILE) + (self._rate.num_due if self._rate is not None else 0)
        self._num_steps_left -= 1
        if self._rate is None:
            return most
        self._credit += max(self._rate.num_tokens - num_decoding, self._rate.num_prompt_tokens)
        wanted = int(self._credit if num_decoding else max(self._credit, ROW_TILE)) + num_decoding
        num_tokens = (most if wanted >= most else _whole_tiles(wanted)) - num_decoding
        if num_decoding and wanted < most and num_tokens < MIN_CHUNK:
            return 0
        self._credit -= num_tokens
        return num_tokens

    def _find_rate(self, waiting: RankedQueue, running_S: np.ndarray) -> _Rate | None:
        """None where nobody knows how long answers will be."""
        batch = self._batch
        facts_W = np.array(
            [(len(each.token_ids), 0, each.num_prompt_tokens, each.max_length, each.can_stop) for each in waiting]
        )
        columns_N = (
            batch.lengths_N, batch.num_computed_N, batch.num_prompt_tokens_N, batch.max_lengths_N, batch.can_stop_N,
        )  # fmt: skip
        lengths, num_computed, num_asked, max_lengths, can_stop = (
            np.concatenate([column_N[running_S], column_W])
            for column_N, column_W in zip(columns_N, facts_W.T, strict=True)
        )
        if can_stop.any() and not self._lengths.is_known:
            return None
        num_left = np.maximum(self._lengths.expect_left(lengths, num_asked, max_lengths, can_stop), 0)
        most_left, num_uncomputed = max_lengths - lengths, lengths - num_computed
        is_prompt = num_uncomputed > 1
        is_prompt[len(running_S) :] = True
        num_steps = max(int(num_left.max()), 1)
        slack, num_ahead = num_steps - most_left[is_prompt], num_uncomputed[is_prompt].cumsum()
        is_due = slack <= STEPS_BETWEEN
        num_due = int(num_ahead[is_due].max(initial=0))
        num_needed = float((num_ahead[~is_due] / slack[~is_due]).max(initial=0.0))
        average = int(num_uncomputed[is_prompt].sum() + num_left.sum()) / num_steps
        return _Rate(max(average, MIN_TOKENS), num_needed, num_due)
