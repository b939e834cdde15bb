"""One generation: prompts as token ids in, pieces of text out, with every clean-up that a vanished client needs."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec

from ..errors import FlashError
from ..request import EngineRequest, SamplingParams, SequenceDelta, TokenLogprobs
from ..text.stream import TextStream
from .mailbox import Mailbox
from .metrics import Metrics
from .models import ModelManager, ServedModel, bounded


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """New text of one answer."""

    index: int
    """Which answer: prompt number times `n`, plus which of its `n`."""
    text: str
    """May be empty: a token that is half a character, or text that may still become a stop string."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One for each of `token_ids`, when asked for."""
    finish_reason: str | None
    """`stop`, `length` or `abort` in an answer's last piece."""


@dataclasses.dataclass(slots=True)
class Usage:
    """Tokens and seconds of a generation, counted as it goes."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    load_s: float = 0.0
    prompt_s: float = 0.0
    """From the arrival to the first token, but for the wait for the model."""
    decode_s: float = 0.0
    """From the first token to the last."""


class _Answer:
    """Text and state of one answer."""

    def __init__(self, stream: TextStream) -> None:
        self.stream = stream
        self.is_finished = False
        self.last_token_s: float | None = None


class _Counts:
    """The metrics of one model that every piece of text touches, looked up once."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self.tokens = metrics.generation_tokens.labels(name)
        self.time_to_first_token = metrics.time_to_first_token.labels(name)
        self.inter_token_latency = metrics.inter_token_latency.labels(name)


class Generation:
    """Runs prompts on a model and turns token ids into text.

    Args:
        models: Brings the model onto the device.
        metrics: Where tokens and latencies are counted.
        model: What to run.
        prompts: Token ids of each prompt.
        sampling: For every prompt; its stop strings are looked for here, its stop token ids by the engine.
        keep_alive_s: How long the model stays once idle; None: as before. 0: it leaves after this request.
        priority: Of its requests in the engine's queue.
        is_streamed: Whether somebody reads the pieces as they come; if not, the engine hands out whole answers, and
            there is no time to the first token to be seen.
    """

    def __init__(
        self,
        models: ModelManager,
        metrics: Metrics,
        model: ServedModel,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        keep_alive_s: float | None = None,
        priority: int = 0,
        is_streamed: bool = True,
    ) -> None:
        self.model = model
        self.usage = Usage(num_prompt_tokens=sum(map(len, prompts)))
        self._models, self._metrics = models, metrics
        self._counts = _Counts(metrics, model.name)
        self._sampling, self._keep_alive_s = _with_own_eos(sampling, model), keep_alive_s
        self._prompts, self._priority, self._is_streamed = prompts, priority, is_streamed
        self._mailbox = Mailbox()
        self._answers = [
            _Answer(TextStream(model.tokenizer, stop=sampling.stop)) for _ in range(len(prompts) * sampling.n)
        ]
        self._first_index: dict[str, int] = {}
        self._num_open: dict[str, int] = {}
        self._arrival_s = time.monotonic()

    async def pieces(self) -> AsyncGenerator[list[Piece]]:
        """Yield what is new, until every answer has finished.

        Close the generator to stop early (`contextlib.aclosing`): what still runs is aborted at the worker.

        Raises:
            FlashError: The model could not be loaded, or the worker refused or lost the request.
        """
        try:
            self._submit()
            self._metrics.prompt_tokens.labels(self.model.name).inc(self.usage.num_prompt_tokens)
            while self._num_open:
                deltas = join_deltas(await self._mailbox.take())
                pieces = [piece for piece in map(self._piece, deltas) if piece is not None]
                if pieces:
                    yield pieces
        except FlashError as error:
            self._metrics.request_failure.labels(self.model.name, error.code).inc()
            raise
        finally:
            for request_id in self._num_open:
                self._models.supervisor.abort(request_id)

    def _submit(self) -> None:
        """Send every prompt to the worker, which brings the model to the device where it is not there."""
        self._models.register(self.model)
        for number, prompt in enumerate(self._prompts):
            request = EngineRequest(
                request_id=uuid.uuid4().hex,
                model=self.model.name,
                prompt_token_ids=prompt,
                sampling=self._sampling,
                priority=self._priority,
                is_streamed=self._is_streamed,
            )
            self._first_index[request.request_id] = number * self._sampling.n
            self._num_open[request.request_id] = self._sampling.n
            self._models.supervisor.submit(request, self._mailbox, bounded(self._keep_alive_s))

    def _piece(self, delta: SequenceDelta) -> Piece | None:
        index = self._first_index[delta.request_id] + delta.index
        answer = self._answers[index]
        if answer.is_finished:
            return None  # tokens computed before the worker heard of a stop string
        text, num_tokens = self._text(delta, answer)
        token_ids = delta.token_ids[:num_tokens]
        self._count(delta, answer, num_tokens)
        finish_reason = delta.finish_reason
        if answer.stream.stopped_by is not None:
            if finish_reason is None:
                self._models.supervisor.abort(delta.request_id, delta.index, "stop")
            finish_reason = "stop"
        if finish_reason is not None:
            self._finish(delta.request_id, answer, finish_reason)
        return Piece(index, text, token_ids, delta.logprobs and delta.logprobs[:num_tokens], finish_reason)

    def _text(self, delta: SequenceDelta, answer: _Answer) -> tuple[str, int]:
        """The text that a delta adds, and how many of its tokens there are up to a stop string."""
        ended_by_token = delta.finish_reason == "stop" and delta.stop_token_id is not None
        shown_ids = delta.token_ids[:-1] if ended_by_token else delta.token_ids
        if self._sampling.stop:
            text = ""
            for position, token_id in enumerate(shown_ids):
                text += answer.stream.push((token_id,))
                if answer.stream.stopped_by is not None:
                    return text, position + 1
        else:
            text = answer.stream.push(shown_ids)
        if delta.finish_reason is not None:
            text += answer.stream.flush()
        return text, len(delta.token_ids)

    def _count(self, delta: SequenceDelta, answer: _Answer, num_tokens: int) -> None:
        if delta.index == 0 and answer.last_token_s is None:
            self.usage.num_cached_tokens += delta.num_cached_tokens
        if not num_tokens:
            return
        counts, now_s = self._counts, time.monotonic()
        if self.usage.num_generated_tokens == 0:
            self.usage.load_s = self._models.supervisor.load_waits.get(delta.request_id, 0.0)
            self.usage.prompt_s = now_s - self._arrival_s - self.usage.load_s
        self.usage.decode_s = now_s - self._arrival_s - self.usage.load_s - self.usage.prompt_s
        self.usage.num_generated_tokens += num_tokens
        counts.tokens.inc(num_tokens)
        if not self._is_streamed:
            return
        if answer.last_token_s is None:
            counts.time_to_first_token.observe(now_s - self._arrival_s)
        else:
            counts.inter_token_latency.observe((now_s - answer.last_token_s) / num_tokens)
        answer.last_token_s = now_s

    def _finish(self, request_id: str, answer: _Answer, finish_reason: str) -> None:
        answer.is_finished = True
        self._metrics.request_success.labels(self.model.name, finish_reason).inc()
        self._num_open[request_id] -= 1
        if self._num_open[request_id] == 0:
            del self._num_open[request_id]
            self._models.supervisor.forget(request_id)
            self._metrics.e2e_request_latency.labels(self.model.name).observe(time.monotonic() - self._arrival_s)


def _with_own_eos(sampling: SamplingParams, model: ServedModel) -> SamplingParams:
    """`sampling` that also stops at end-of-sequence ids that only the tokenizer's files name."""
    known = {*sampling.stop_token_ids, *model.config.eos_token_ids}
    own = [token_id for token_id in model.tokenizer.eos_token_ids if token_id not in known]
    if sampling.ignore_eos or not own:
        return sampling
    return msgspec.structs.replace(sampling, stop_token_ids=[*sampling.stop_token_ids, *own])


def join_deltas(deltas: list[SequenceDelta]) -> list[SequenceDelta]:
    """One delta for each answer, in place of those that came one after the other while nobody read."""
    if len(deltas) == 1:
        return deltas
    by_answer: dict[tuple[str, int], list[SequenceDelta]] = {}
    for delta in deltas:
        by_answer.setdefault((delta.request_id, delta.index), []).append(delta)
    return [_joined(own) for own in by_answer.values()]


def _joined(deltas: list[SequenceDelta]) -> SequenceDelta:
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    logprobs = [position for delta in deltas for position in delta.logprobs or ()]
    return msgspec.structs.replace(
        last,
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs or None,
        num_cached_tokens=first.num_cached_tokens,
    )
