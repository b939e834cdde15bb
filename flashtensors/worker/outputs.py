"""Builds the text and the answers of one request from its deltas."""

from __future__ import annotations

from ..request import CompletionOutput, EngineRequest, RequestOutput, SequenceDelta
from ..text.stream import TextStream
from ..text.tokenizer import Tokenizer


class OutputBuilder:
    """All answers of one request, as far as they are known.

    Args:
        request: What was asked.
        prompt: Its text; None when it came as token ids.
        tokenizer: The model's.
    """

    def __init__(self, request: EngineRequest, prompt: str | None, tokenizer: Tokenizer) -> None:
        self.request = request
        """What was asked."""
        self._prompt = prompt
        sampling = request.sampling
        self._answers = [_Answer(index, request, tokenizer) for index in range(sampling.n)]
        self.num_open = sampling.n
        """Answers without a finish reason."""
        self.num_cached_tokens = 0
        """Prompt tokens that were found in the prefix cache, as far as is known."""

    @property
    def is_finished(self) -> bool:
        """Whether every answer has a finish reason."""
        return self.num_open == 0

    def push(self, delta: SequenceDelta) -> bool:
        """Take in new tokens.

        Returns:
            Whether a stop string ended the answer while the engine goes on with it: abort it there.
        """
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        answer = self._answers[delta.index]
        was_open = answer.finish_reason is None
        is_to_abort = answer.push(delta)
        self.num_open -= was_open and answer.finish_reason is not None
        return is_to_abort

    def output(self) -> RequestOutput:
        """The answers so far; later deltas do not change it."""
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[answer.output() for answer in self._answers],
            finished=self.is_finished,
            num_cached_tokens=self.num_cached_tokens,
        )


class _Answer:
    """One of the `n` answers."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: Tokenizer) -> None:
        self.finish_reason: str | None = None
        self._index = index
        self._sampling = request.sampling
        self._stream = TextStream(tokenizer, stop=request.sampling.stop)
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs = None if request.sampling.logprobs is None else []
        self._stop_reason: int | str | None = None

    def push(self, delta: SequenceDelta) -> bool:
        if self.finish_reason is not None:
            return False  # tokens computed before the engine heard of a stop string
        if self._sampling.stop:
            if self._push_up_to_stop(delta):
                return self._stop_at_string(delta)
        else:
            self._token_ids += delta.token_ids
            if self._logprobs is not None:
                self._logprobs += delta.logprobs or ()
            self._text += self._stream.push(delta.token_ids[: None if delta.stop_token_id is None else -1])
        if delta.finish_reason is not None:
            self._finish(delta)
        return False

    def _push_up_to_stop(self, delta: SequenceDelta) -> bool:
        """Take in tokens one by one, up to that with which a stop string ends; returns whether there was one."""
        for position, token_id in enumerate(delta.token_ids):
            self._token_ids.append(token_id)
            if self._logprobs is not None and delta.logprobs is not None:
                self._logprobs.append(delta.logprobs[position])
            is_last = delta.stop_token_id is not None and position == len(delta.token_ids) - 1
            if not is_last:  # the token that ends an answer is not part of its text
                self._text += self._stream.push([token_id])
            if self._stream.stopped_by is not None:
                return True
        return False

    def _stop_at_string(self, delta: SequenceDelta) -> bool:
        self.finish_reason, self._stop_reason = "stop", self._stream.stopped_by
        return delta.finish_reason is None

    def _finish(self, delta: SequenceDelta) -> None:
        self._text += self._stream.flush()
        if self._stream.stopped_by is not None:
            self._stop_at_string(delta)
            return
        self.finish_reason = delta.finish_reason
        if delta.stop_token_id in self._sampling.stop_token_ids:
            self._stop_reason = delta.stop_token_id

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self._index,
            text=self._text,
            token_ids=list(self._token_ids),
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
        )
