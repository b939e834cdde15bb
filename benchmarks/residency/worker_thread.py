"""A worker on a thread, as the daemon's process runs one, with the time of everything that it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from flashtensors.config import Settings
from flashtensors.errors import FlashError
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.worker.host import Worker
from flashtensors.worker.inbox import Inbox
from flashtensors.worker.messages import Command, Deltas, Event, Generate, RequestFailed, Shutdown

EVENT = TypeVar("EVENT")


@dataclass
class Answer:
    """One request and what became of it; times are those of `time.perf_counter`."""

    request_id: str
    model: str
    sent_s: float
    token_times_s: list[float] = field(default_factory=list)
    """When each token came."""
    token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Of the prompt, found in the KV cache."""
    error: FlashError | None = None
    is_over: bool = False

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to the first token."""
        return self.token_times_s[0] - self.sent_s


class WorkerThread:
    """A worker that several models of one device share."""

    def __init__(self, settings: Settings) -> None:
        self.events: list[tuple[float, Event]] = []
        """Everything but tokens, with its time."""
        self.on_deltas: Callable[[Deltas], None] = lambda event: None
        """Called on the worker's thread with every message of tokens."""
        self._settings = settings
        self._condition = threading.Condition()
        self._inbox = Inbox()
        self._answers: dict[str, Answer] = {}
        self._num_requests = 0
        self._failure: BaseException | None = None
        self.worker: Worker
        self._thread = threading.Thread(target=self._run, name="worker")
        self._thread.start()

    def send(self, command: Command) -> None:
        """Give the worker a command."""
        self._inbox.put(command)

    def ask(self, model: str, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Send a greedy request that is not cut off at an end token."""
        with self._condition:
            self._num_requests += 1
            answer = Answer(f"r{self._num_requests}", model, time.perf_counter())
            self._answers[answer.request_id] = answer
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        request = EngineRequest(
            request_id=answer.request_id, model=model, prompt_token_ids=list(prompt), sampling=sampling
        )
        self.send(Generate(request=request))
        return answer

    def wait(self, *answers: Answer, timeout_s: float = 300.0) -> None:
        """Wait until the answers are over; raises what went wrong."""
        self._wait(lambda: all(answer.is_over for answer in answers), timeout_s)
        for answer in answers:
            if answer.error is not None:
                raise answer.error

    def obey(self, command: Command, kind: type[EVENT], timeout_s: float = 300.0) -> EVENT:
        """Send a command and wait for the event that answers it."""
        first = len(self.events)
        self.send(command)
        found: list[EVENT] = []

        def has_come() -> bool:
            found[:] = [event for _, event in self.events[first:] if isinstance(event, kind)]
            return bool(found)

        self._wait(has_come, timeout_s)
        return found[0]

    def of(self, kind: type[EVENT], since: int = 0) -> list[EVENT]:
        """Events of a kind, from position `since` of all of them."""
        return [event for _, event in self.events[since:] if isinstance(event, kind)]

    def __enter__(self) -> Self:
        self._wait(lambda: hasattr(self, "worker"), 300.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.send(Shutdown())
        self._thread.join()

    def _wait(self, is_there: Callable[[], bool], timeout_s: float) -> None:
        with self._condition:
            if not self._condition.wait_for(lambda: self._failure is not None or is_there(), timeout_s):
                raise SystemExit(f"nothing came in {timeout_s} s; last events: {self.events[-3:]}")
            if self._failure is not None:
                raise self._failure

    def _run(self) -> None:
        try:
            worker = Worker(self._settings, emit=self._take, wake=self._inbox.ring)
            with self._condition:
                self.worker = worker
                self._condition.notify_all()
            self._inbox.serve(worker)
        except BaseException as error:  # handed to the thread that waits
            with self._condition:
                self._failure = error
                self._condition.notify_all()

    def _take(self, event: Event) -> None:
        now_s = time.perf_counter()
        with self._condition:
            match event:
                case Deltas(deltas=deltas):
                    self.on_deltas(event)
                    for delta in deltas:
                        self._add(delta, now_s)
                case RequestFailed(request_id=request_id, error=error):
                    answer = self._answers.pop(request_id)
                    answer.error, answer.is_over = error.unpack(), True
                case _:
                    self.events.append((now_s, event))
            self._condition.notify_all()

    def _add(self, delta: Any, now_s: float) -> None:
        answer = self._answers[delta.request_id]
        answer.token_ids += delta.token_ids
        answer.num_cached_tokens = max(answer.num_cached_tokens, delta.num_cached_tokens)
        answer.token_times_s += [now_s] * len(delta.token_ids)
        if delta.finish_reason is not None:
            answer.is_over = True
            del self._answers[delta.request_id]
