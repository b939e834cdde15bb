"""The requests that a worker has accepted and not yet answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import RequestError
from ..request import EngineRequest, SequenceDelta
from .messages import FirstToken


@dataclass(slots=True)
class _Waiting:
    request: EngineRequest
    tier: str
    since_s: float
    started_s: float = 0.0


@dataclass(slots=True)
class _Running:
    model: str
    num_open: int
    """Answers without a finish reason."""


class RequestTable:
    """Requests that run, and requests parked while their model is on its way."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._parked: dict[str, _Waiting] = {}
        self._num_parked: Counter[tuple[str, bool]] = Counter()
        """By model, and whether they are batch work."""
        self._unanswered: dict[str, _Waiting] = {}
        """Of those that run, the ones without a first token."""

    def check_new(self, request: EngineRequest) -> None:
        """Raise `RequestError` when the id is in use."""
        if request.request_id in self._running or request.request_id in self._parked:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another", param="request_id")

    def park(self, request: EngineRequest, tier: str, now_s: float) -> None:
        """Keep a request until its model is ready.

        Args:
            request: It.
            tier: Where its model is now.
            now_s: The time.
        """
        self._parked[request.request_id] = _Waiting(request, tier, now_s)
        self._num_parked[request.model, request.is_batch] += 1

    def unpark(self, request_id: str) -> EngineRequest:
        """Hand over a parked request that is refused or given up."""
        return self._take_parked(request_id).request

    def num_parked(self, model: str, *, with_batch_work: bool) -> int:
        """Requests that wait for a model."""
        num_batch = self._num_parked[model, True] if with_batch_work else 0
        return self._num_parked[model, False] + num_batch

    def start(self, request_id: str, now_s: float) -> EngineRequest:
        """Hand over a parked request to the engine of its model."""
        waiting = self._take_parked(request_id)
        request = waiting.request
        self._running[request_id] = _Running(request.model, request.sampling.n)
        waiting.started_s = now_s
        self._unanswered[request_id] = waiting
        return request

    def find_model(self, request_id: str) -> str | None:
        """Model that runs a request; None when it does not run."""
        running = self._running.get(request_id)
        return None if running is None else running.model

    def first_tokens(self, deltas: Iterable[SequenceDelta], now_s: float) -> list[FirstToken]:
        """Requests that have their first tokens with these deltas."""
        if not self._unanswered:
            return []
        firsts: list[FirstToken] = []
        for delta in deltas:
            waiting = self._unanswered.pop(delta.request_id, None)
            if waiting is not None and delta.token_ids:
                request, since_s = waiting.request, waiting.since_s
                waited_s, seconds = waiting.started_s - since_s, now_s - since_s
                firsts.append(
                    FirstToken(delta.request_id, request.model, waiting.tier, waited_s, seconds, request.is_streamed)
                )
        return firsts

    def finish(self, deltas: Iterable[SequenceDelta]) -> list[str]:
        """Count answers that these deltas end; returns the model of each request that is complete with them."""
        models: list[str] = []
        for delta in deltas:
            if delta.finish_reason is None:
                continue
            running = self._running[delta.request_id]
            running.num_open -= 1
            if running.num_open == 0:
                models.append(self.take(delta.request_id))
        return models

    def take(self, request_id: str) -> str:
        """Forget a request that runs, and return its model."""
        self._unanswered.pop(request_id, None)
        return self._running.pop(request_id).model

    def take_running(self, model: str) -> list[str]:
        """Forget the requests that run on `model`, and return their ids."""
        request_ids = [request_id for request_id, running in self._running.items() if running.model == model]
        for request_id in request_ids:
            self.take(request_id)
        return request_ids

    def take_all(self) -> list[str]:
        """Forget every request, and return their ids."""
        request_ids = [*self._running, *self._parked]
        for requests in (self._running, self._parked, self._num_parked, self._unanswered):
            requests.clear()
        return request_ids

    def _take_parked(self, request_id: str) -> _Waiting:
        waiting = self._parked.pop(request_id)
        self._num_parked[waiting.request.model, waiting.request.is_batch] -= 1
        return waiting

    def find_parked(self, request_id: str) -> EngineRequest | None:
        """A request that waits for its model; None when it does not."""
        waiting = self._parked.get(request_id)
        return None if waiting is None else waiting.request


def last_deltas(request: EngineRequest, finish_reason: str) -> list[SequenceDelta]:
    """What ends all answers of a request that has not run."""
    return [
        SequenceDelta(request_id=request.request_id, index=index, token_ids=[], finish_reason=finish_reason)
        for index in range(request.sampling.n)
    ]


def check_token_ids(request: EngineRequest, vocab_size: int) -> None:
    """Refuse ids that are not rows of the model's embedding."""
    sampling = request.sampling
    named = {
        "prompt": request.prompt_token_ids,
        "logit_bias": list(sampling.logit_bias),
        "stop_token_ids": sampling.stop_token_ids,
    }
    for param, token_ids in named.items():
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            wrong = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise RequestError(
                f"{param} holds token id {wrong}, but {request.model} knows 0 to {vocab_size - 1}", param=param
            )
