"""Deltas on their way out, and when tokens become one.

Shapes: S running slots.
"""

from __future__ import annotations

import numpy as np

from ..request import SequenceDelta
from .batch import Batch
from .sequence import Sequence, SequenceState


class Outbox:
    """Turns tokens into deltas: a first token and an end at once, others of a streamed answer at intervals.

    Args:
        batch: Where tokens of running sequences lie.
        interval_s: Least time between two deltas of one answer; 0 makes every token one.
    """

    def __init__(self, batch: Batch, interval_s: float) -> None:
        self._batch = batch
        self._interval_s = interval_s
        self._deltas: list[SequenceDelta] = []

    def __len__(self) -> int:
        return len(self._deltas)

    def take(self) -> list[SequenceDelta]:
        """All deltas since the last call."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def send_due(self, slots_S: np.ndarray, now_s: float) -> None:
        """Hand out what streamed answers in these slots have waited with for an interval."""
        batch = self._batch
        slots_S = slots_S[batch.is_streamed_N[slots_S]]
        if len(slots_S) == 0:
            return
        is_due_S = batch.num_known_N[slots_S] > batch.num_sent_N[slots_S]
        is_due_S &= now_s - batch.sent_s_N[slots_S] >= self._interval_s
        for slot in slots_S[is_due_S].tolist():
            batch.gather(slot)
            batch.num_sent_N[slot] = batch.num_known_N[slot]
            batch.sent_s_N[slot] = now_s
            self.send(batch.sequence(slot))

    def send(self, sequence: Sequence, finish_reason: str | None = None, *, is_stopped: bool = False) -> None:
        """Hand out all gathered tokens of a sequence. Only its first delta counts cached tokens.

        Args:
            sequence: Whose.
            finish_reason: Why its answer ends; None while it goes on.
            is_stopped: Whether the last token is the stop token that ends it.
        """
        assert sequence.state is not SequenceState.FINISHED, "a delta after the last one"
        token_ids = sequence.token_ids[sequence.num_prompt_tokens + sequence.num_reported :]
        logprobs, sequence.logprobs = sequence.logprobs, []
        self._deltas.append(
            SequenceDelta(
                request_id=sequence.request_id,
                index=sequence.index,
                token_ids=token_ids,
                logprobs=logprobs or None,
                finish_reason=finish_reason,
                stop_token_id=token_ids[-1] if is_stopped else None,
                num_cached_tokens=0 if sequence.has_reported else sequence.num_cached_tokens or 0,
            )
        )
        sequence.num_reported += len(token_ids)
        sequence.has_reported = True
