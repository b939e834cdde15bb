"""The engine: requests in, deltas out, one step at a time."""

from __future__ import annotations

import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import CapacityError, RequestError
from ..kvcache.prefix_cache import PrefixCache
from ..request import EngineRequest, SequenceDelta
from ..step import StepPlan, StepPostponed, StepResult
from .outbox import Outbox
from .runner_protocol import Runner
from .scheduler import Scheduler
from .sequence import Sequence, SequenceState, find_max_length, make_sequences
from .stats import EngineStats
from .turns import Turns

STREAM_INTERVAL_S = 0.02
"""Least time between two deltas of one answer: fifty a second, more than anybody reads."""


@dataclass(frozen=True, slots=True)
class _Drawers:
    """Whom a launched step draws tokens for."""

    slots_R: np.ndarray
    epochs_R: np.ndarray
    max_lengths_R: np.ndarray
    num_changes: int
    """`Batch.num_changes` at the launch: while it is the same, they all are in their slots."""


class _StepInFlight(NamedTuple):
    step: int
    drawers: _Drawers


class Engine:
    """Continuous batching over one runner. Not thread-safe: one thread adds, aborts and steps.

    Args:
        runner: Executes the steps.
        enable_prefix_caching: Share KV cache blocks between prompts that begin alike.
        max_queue: Answers that may wait before new requests are refused; None: any number. Batch work counts only
            against batch work: it is refused when so many of any kind wait, others when so many of theirs do.
        seeds: Where the seed of a request comes from that fixes none; None: the operating system.
        stream_interval_s: Least time between two deltas of one streamed answer. Its first token and its end never wait.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        enable_prefix_caching: bool = True,
        max_queue: int | None = None,
        seeds: random.Random | None = None,
        stream_interval_s: float = STREAM_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits = runner.limits
        self.scheduler = Scheduler(
            limits, PrefixCache(limits.num_blocks, limits.block_size, is_enabled=enable_prefix_caching)
        )
        self._runner = runner
        self._max_queue = max_queue
        self._seeds = seeds or random.Random()
        self._clock = clock
        self._turns = Turns()
        self._outbox = Outbox(self.scheduler.batch, stream_interval_s)
        self._alive: dict[str, list[Sequence]] = {}
        self._in_flight: deque[_StepInFlight] = deque()
        self._drawers: _Drawers | None = None
        self._unlaunched: StepPlan | None = None
        """The last plan, while its launch is postponed."""
        self._failures: dict[str, str] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: answers to compute, steps to collect or deltas to hand out."""
        return bool(self._alive or self._unlaunched or self._in_flight or self._outbox or self._failures)

    def step(self) -> list[SequenceDelta]:
        """Launch as many steps as may be in flight, collect the oldest, and return what is due; [] when idle."""
        while len(self._in_flight) < self.scheduler.limits.max_steps_in_flight:
            if not self._launch_next():
                break
        if self._in_flight:
            self._collect_oldest()
        self._send()
        return self._outbox.take()

    def _launch_next(self) -> bool:
        """Plan a step and launch it, or the one that was postponed; whether there was one, and it could be."""
        if self._unlaunched is None:
            plan = self.scheduler.schedule()
            if plan is None:
                return False
            self._unlaunched, self._drawers = plan, self._find_drawers(plan)
        plan, drawers = self._unlaunched, self._drawers
        assert drawers is not None, "a plan for nobody"
        with contextlib.suppress(StepPostponed):
            self._runner.launch(plan)
            self._unlaunched = None
            self._in_flight.append(_StepInFlight(plan.step, drawers))
        return self._unlaunched is None

    def drain(self) -> None:
        """Collect all steps in flight: those that were launched before the last answer turned out to have ended."""
        while self._in_flight:
            self._collect_oldest()

    def _find_drawers(self, plan: StepPlan) -> _Drawers:
        batch, last = self.scheduler.batch, self._drawers
        if plan.is_steady and last is not None and last.num_changes == batch.num_changes:
            return last
        slots_R = plan.spans[plan.spans[:, 3] == 1, 0].astype(np.int64)
        return _Drawers(slots_R, batch.epochs_N[slots_R], batch.max_lengths_N[slots_R], batch.num_changes)

    def _collect_oldest(self) -> None:
        """A step that fails stays in flight: the engine has work for ever, and nobody takes it for sound."""
        self._collect(self._in_flight[0], self._runner.collect())
        self._in_flight.popleft()

    def _collect(self, step: _StepInFlight, result: StepResult) -> None:
        """Learn the tokens of a step; those drawn beyond the end of an answer are dropped."""
        batch, drawers = self.scheduler.batch, step.drawers
        assert result.step == step.step, "the runner answered another step"
        assert np.array_equal(result.slots, drawers.slots_R), "the runner drew for other slots"
        slots_R, token_ids_R, is_stopped_R = drawers.slots_R, result.token_ids, result.is_stopped
        max_lengths_R = drawers.max_lengths_R
        absent: list[int] = []
        if drawers.num_changes != batch.num_changes or result.failed:
            is_seated_R = batch.epochs_N[slots_R] == drawers.epochs_R
            if result.failed:
                is_seated_R &= ~np.isin(slots_R, list(result.failed))
            slots_R, token_ids_R = slots_R[is_seated_R], token_ids_R[is_seated_R]
            is_stopped_R, max_lengths_R = is_stopped_R[is_seated_R], max_lengths_R[is_seated_R]
            absent = np.flatnonzero(~is_seated_R).tolist()
        is_ended_R = is_stopped_R | (batch.take_tokens(slots_R, token_ids_R) >= max_lengths_R)
        if result.logprobs:
            for slot in slots_R.tolist():
                if slot in result.logprobs:
                    batch.sequence(slot).logprobs.append(result.logprobs[slot])
        for row in np.flatnonzero(is_ended_R).tolist():
            is_stopped = bool(is_stopped_R[row])
            self._end(batch.sequence(int(slots_R[row])), "stop" if is_stopped else "length", is_stopped=is_stopped)
        for row in absent:
            self._collect_absent(drawers, result, row)

    def _collect_absent(self, drawers: _Drawers, result: StepResult, row: int) -> None:
        """Learn a token of a sequence that failed, or gave way or ended since the step was launched."""
        batch, slot, epoch = self.scheduler.batch, int(drawers.slots_R[row]), int(drawers.epochs_R[row])
        if slot in result.failed:
            sequence = batch.sequence(slot) if batch.epochs_N[slot] == epoch else batch.take_absent(slot, epoch)
            if sequence is not None:
                self._fail(sequence.request_id, result.failed[slot])
            return
        token_id, is_stopped = int(result.token_ids[row]), bool(result.is_stopped[row])
        sequence = batch.take_absent_token(slot, epoch, token_id, result.logprobs.get(slot))
        if sequence is not None and (is_stopped or len(sequence.token_ids) >= sequence.max_length):
            self._end(sequence, "stop" if is_stopped else "length", is_stopped=is_stopped)

    def add(self, request: EngineRequest, stop_token_ids: Iterable[int]) -> None:
        """Queue a request; its answers come from `step`.

        Args:
            request: The prompt and how to continue it.
            stop_token_ids: The model's end-of-sequence ids; they count unless `sampling.ignore_eos`.

        Raises:
            ContextTooLong: Prompt and answer can never fit.
            RequestError: An empty prompt, or the id of a request that is alive.
            CapacityError: `max_queue` answers wait already, not counting batch work where `request` is none.
        """
        if request.request_id in self._alive:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another", param="request_id")
        max_length = find_max_length(request, self.scheduler.limits)
        waiting = self.scheduler.waiting
        num_waiting = len(waiting) if request.is_batch else waiting.num_interactive
        if self._max_queue is not None and num_waiting >= self._max_queue:
            raise CapacityError(
                f"{num_waiting} answers wait for model {request.model!r}, and at most {self._max_queue} may; try later"
            )
        sequences = make_sequences(
            request,
            stop_token_ids,
            max_length=max_length,
            turn=self._turns.next(request, max_length - len(request.prompt_token_ids)),
            seed=self._seeds.getrandbits(64),
        )
        self._alive[request.request_id] = sequences
        for sequence in sequences:
            self.scheduler.enqueue(sequence)

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        """Stop a request, or one of its answers, at once; the next `step` returns the last deltas.

        An unknown or finished request is ignored: it may have ended while the message was on its way.
        """
        for sequence in list(self._alive.get(request_id, ())):
            if index is None or sequence.index == index:
                self._end(sequence, finish_reason)

    def take_failures(self) -> dict[str, str]:
        """Requests that the runner could not go on with, each with the reason, since the last call.

        All answers of such a request have ended; deltas handed out before this call are all that there are of it.
        """
        failures, self._failures = self._failures, {}
        return failures

    def _fail(self, request_id: str, reason: str) -> None:
        """End a request; what it computed may be why it failed, and must not fail those that begin like it."""
        self._failures[request_id] = reason
        for sequence in self._alive.pop(request_id):
            self.scheduler.finish(sequence)
            self.scheduler.cache.forget(sequence.token_ids)

    def _end(self, sequence: Sequence, finish_reason: str, *, is_stopped: bool = False) -> None:
        """Hand out the last delta of a sequence and let go of it."""
        if sequence.state is SequenceState.RUNNING:
            self.scheduler.batch.gather(sequence.slot)
        if finish_reason != "abort":
            self.scheduler.lengths.add(sequence.num_generated)
        self._outbox.send(sequence, finish_reason, is_stopped=is_stopped)
        self.scheduler.finish(sequence)
        siblings = self._alive[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._alive[sequence.request_id]

    def _send(self) -> None:
        """Hand out what is due: of those that run, and of those that gave way and no longer draw tokens."""
        self._outbox.send_due(self.scheduler.running_slots, self._clock())
        for sequence in self.scheduler.take_preempted():
            if sequence.state is SequenceState.WAITING and sequence.is_streamed and sequence.num_unsent > 0:
                self._outbox.send(sequence)

    def stats(self) -> EngineStats:
        """Numbers for metrics."""
        scheduler, pool = self.scheduler, self.scheduler.cache.pool
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_usage=1 - pool.num_free / pool.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_generated=scheduler.batch.num_generated,
        )
