"""The requests that a worker has accepted and not yet answered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import RequestError
from ..request import EngineRequest, SequenceDelta


@dataclass
class _Running:
    model: str
    num_open: int
    """Answers without a finish reason."""


class RequestTable:
    """Requests that run, and requests parked while their model is on its way."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._parked: dict[str, EngineRequest] = {}

    def check_new(self, request: EngineRequest) -> None:
        """Raise `RequestError` when the id is in use."""
        if request.request_id in self._running or request.request_id in self._parked:
            raise RequestError(f"request id {request.request_id!r} is in use; choose another", param="request_id")

    def start(self, request: EngineRequest) -> None:
        """The model's engine has the request."""
        self._running[request.request_id] = _Running(request.model, request.sampling.n)

    def find_model(self, request_id: str) -> str | None:
        """Model that runs a request; None when it does not run."""
        running = self._running.get(request_id)
        return None if running is None else running.model

    def finish(self, deltas: Iterable[SequenceDelta]) -> list[str]:
        """Count answers that these deltas end; returns the model of each request that is complete with them."""
        models: list[str] = []
        for delta in deltas:
            if delta.finish_reason is None:
                continue
            running = self._running[delta.request_id]
            running.num_open -= 1
            if running.num_open == 0:
                models.append(self._running.pop(delta.request_id).model)
        return models

    def take(self, request_id: str) -> str:
        """Forget a request that runs, and return its model."""
        return self._running.pop(request_id).model

    def take_running(self, model: str) -> list[str]:
        """Forget the requests that run on `model`, and return their ids."""
        request_ids = [request_id for request_id, running in self._running.items() if running.model == model]
        for request_id in request_ids:
            del self._running[request_id]
        return request_ids

    def take_all(self) -> list[str]:
        """Forget every request, and return their ids."""
        request_ids = [*self._running, *self._parked]
        self._running.clear()
        self._parked.clear()
        return request_ids

    def park(self, request: EngineRequest) -> None:
        """Keep a request until its model is ready or gone."""
        self._parked[request.request_id] = request

    def num_parked(self, model: str) -> int:
        """Requests that wait for `model`."""
        return sum(request.model == model for request in self._parked.values())

    def parked_models(self) -> list[str]:
        """Models that parked requests wait for."""
        return list(dict.fromkeys(request.model for request in self._parked.values()))

    def take_parked(self, model: str) -> list[EngineRequest]:
        """Hand over the requests that wait for `model`, in the order they came."""
        requests = [request for request in self._parked.values() if request.model == model]
        for request in requests:
            del self._parked[request.request_id]
        return requests

    def abort_parked(self, request_id: str, index: int | None, finish_reason: str) -> list[SequenceDelta]:
        """Drop a parked request; the last deltas of its answers, empty when it is not parked.

        To abort one of several answers drops nothing: the others still wait.
        """
        request = self._parked.get(request_id)
        if request is None or (index is not None and request.sampling.n > 1):
            return []
        del self._parked[request_id]
        return [
            SequenceDelta(request_id=request_id, index=each, token_ids=[], finish_reason=finish_reason)
            for each in range(request.sampling.n)
        ]
