"""The engine: requests in, deltas out, one step at a time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

from ..errors import CapacityError, RequestError
from ..kvcache.prefix_cache import PrefixCache
from ..request import EngineRequest, SequenceDelta, TokenLogprobs
from .runner_protocol import Runner
from .scheduler import Scheduler
from .sequence import Sequence, SequenceState, find_max_length, make_sequences
from .stats import EngineStats


class Engine:
    """Continuous batching over one runner. Not thread-safe: one thread adds, aborts and steps.

    Args:
        runner: Executes the steps.
        enable_prefix_caching: Share KV cache blocks between prompts that begin alike.
        max_queue: Answers that may wait before new requests are refused; None: any number.
        seeds: Where the seed of a request comes from that fixes none; None: the operating system.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        enable_prefix_caching: bool = True,
        max_queue: int | None = None,
        seeds: random.Random | None = None,
    ) -> None:
        limits = runner.limits
        self.scheduler = Scheduler(
            limits, PrefixCache(limits.num_blocks, limits.block_size, is_enabled=enable_prefix_caching)
        )
        self._runner = runner
        self._max_queue = max_queue
        self._seeds = seeds or random.Random()
        self._num_requests = 0
        self._alive: dict[str, list[Sequence]] = {}
        self._in_flight: deque[tuple[int, list[Sequence]]] = deque()  # step, and the sequences it draws for
        self._deltas: list[SequenceDelta] = []
        self._failures: dict[str, str] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do: answers to compute, steps to collect or deltas to hand out."""
        return bool(self._alive or self._in_flight or self._deltas or self._failures)

    def step(self) -> list[SequenceDelta]:
        """Launch as many steps as may be in flight, collect the oldest, and return what is new; [] when idle."""
        while len(self._in_flight) < self.scheduler.limits.max_steps_in_flight:
            planned = self.scheduler.schedule()
            if planned is None:
                break
            plan, drawing = planned
            self._runner.launch(plan)
            self._in_flight.append((plan.step, drawing))
        if self._in_flight:
            self._collect()
        deltas, self._deltas = self._deltas, []
        return deltas

    def _collect(self) -> None:
        """Learn the tokens of the oldest step; those drawn beyond the end of an answer are dropped."""
        result = self._runner.collect()
        step, drawing = self._in_flight.popleft()
        assert (result.step, len(result.token_ids)) == (step, len(drawing)), "the runner answered another step"
        for slot, sequence, token_id in zip(result.slots.tolist(), drawing, result.token_ids.tolist(), strict=True):
            if sequence.state is SequenceState.FINISHED:
                continue
            if slot in result.failed:
                self._fail(sequence.request_id, result.failed[slot])
            else:
                self.scheduler.append_token(sequence, token_id)
                logprobs = result.logprobs.get(slot)
                self._report(sequence, [token_id], [logprobs] if logprobs else None, sequence.finish_reason())

    def add(self, request: EngineRequest, stop_token_ids: Iterable[int]) -> None:
        """Queue a request; its answers come from `step`.

        Args:
            request: The prompt and how to continue it.
            stop_token_ids: The model's end-of-sequence ids; they count unless `sampling.ignore_eos`.

        Raises:
            ContextTooLong: Prompt and answer can never fit.
            RequestError: An empty prompt, or the id of a request that is alive.
            CapacityError: `max_queue` answers wait already.
        """
        if request.request_id in self._alive:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another", param="request_id")
        max_length = find_max_length(request, self.scheduler.limits)
        num_waiting = len(self.scheduler.waiting)
        if self._max_queue is not None and num_waiting >= self._max_queue:
            raise CapacityError(
                f"{num_waiting} answers wait for model {request.model!r}, and at most {self._max_queue} may; try later"
            )
        sequences = make_sequences(
            request,
            stop_token_ids,
            max_length=max_length,
            arrival=self._num_requests,
            seed=self._seeds.getrandbits(64),
        )
        self._num_requests += 1
        self._alive[request.request_id] = sequences
        for sequence in sequences:
            self.scheduler.enqueue(sequence)

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        """Stop a request, or one of its answers, at once; the next `step` returns the last deltas.

        An unknown or finished request is ignored: it may have ended while the message was on its way.
        """
        for sequence in list(self._alive.get(request_id, ())):
            if index is None or sequence.index == index:
                self._report(sequence, [], None, finish_reason)

    def take_failures(self) -> dict[str, str]:
        """Requests that the runner could not go on with, each with the reason, since the last call.

        All answers of such a request have ended; deltas handed out before this call are all that there are of it.
        """
        failures, self._failures = self._failures, {}
        return failures

    def _fail(self, request_id: str, reason: str) -> None:
        self._failures[request_id] = reason
        for sequence in self._alive.pop(request_id):
            self.scheduler.finish(sequence)

    def _report(
        self, sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs] | None, finish_reason: str | None
    ) -> None:
        """Queue the delta, and let go of a sequence that it ends. Only its first delta counts cached tokens."""
        num_cached_tokens = 0 if sequence.has_reported else sequence.num_cached_tokens or 0
        sequence.has_reported = True
        is_stopped_by_token = finish_reason == "stop" and bool(token_ids)
        self._deltas.append(
            SequenceDelta(
                request_id=sequence.request_id,
                index=sequence.index,
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=finish_reason,
                stop_token_id=token_ids[-1] if is_stopped_by_token else None,
                num_cached_tokens=num_cached_tokens,
            )
        )
        if finish_reason is not None:
            self.scheduler.finish(sequence)
            siblings = self._alive[sequence.request_id]
            siblings.remove(sequence)
            if not siblings:
                del self._alive[sequence.request_id]

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
        )
