"""`POST /v1/chat/completions`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator

from starlette.responses import Response

from ..answers import FullAnswer, collect_answers
from ..bodies import parse_body
from ..context import Call
from ..generation import Generation, Piece
from ..logprobs import chat_logprobs
from ..metrics import Metrics
from ..models import ModelManager
from ..responses import SSE, json_response, open_stream
from .schema import UNSUPPORTED_IN_CHAT, ChatRequest
from .usage import usage_body


async def create_chat_completion(call: Call) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    answer = await open_chat(call.server.models, call.server.metrics, call.body, call.request_id)
    if answer.is_stream:
        return await open_stream(answer.chunks(), SSE)
    return json_response(await answer.whole())


async def open_chat(
    models: ModelManager, metrics: Metrics, body: bytes, request_id: str, *, priority: int = 0
) -> ChatAnswer:
    """Check a body and its prompt; nothing runs before the answer is asked for. Raises `FlashError`."""
    request = parse_body(body, ChatRequest, UNSUPPORTED_IN_CHAT)
    sampling, includes_usage = request.sampling_params(), request.includes_usage
    messages, variables = request.template_messages(), request.template_variables()
    model = await models.open(request.model)
    model.check_sampling(sampling)
    prompt = await model.encode_chat(messages, variables)
    generation = Generation(
        models,
        metrics,
        model,
        [prompt],
        sampling,
        keep_alive_s=request.keep_alive_s,
        priority=priority,
        is_streamed=request.stream,
    )
    return ChatAnswer(f"chatcmpl-{request_id}", request, generation, includes_usage=includes_usage)


class ChatAnswer:
    """One generation in the shape of a chat completion.

    Args:
        completion_id: Its id.
        request: What was asked.
        generation: Makes the text.
        includes_usage: Whether a stream ends with the usage.
    """

    def __init__(
        self, completion_id: str, request: ChatRequest, generation: Generation, *, includes_usage: bool
    ) -> None:
        self.is_stream = request.stream
        """Whether `chunks` was asked for, not `whole`."""
        self._num_answers = request.n
        self._includes_usage = includes_usage
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._head: dict[str, object] = {"id": completion_id, "created": int(time.time()), "model": request.model}

    async def whole(self) -> dict[str, object]:
        """The whole answer."""
        answers = await collect_answers(self._generation, self._num_answers)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(answer) for answer in answers],
            "usage": usage_body(self._generation.usage),
        }

    def _choice(self, answer: FullAnswer) -> dict[str, object]:
        logprobs = chat_logprobs(self._tokenizer, answer.token_ids, answer.logprobs) if answer.logprobs else None
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
        }

    async def chunks(self) -> AsyncGenerator[list[dict[str, object]]]:
        """For each answer a chunk with the role, chunks with text, and one with the finish reason."""
        started: set[int] = set()
        usage: dict[str, object] = {"usage": None} if self._includes_usage else {}
        async with contextlib.aclosing(self._generation.pieces()) as batches:
            async for batch in batches:
                chunks = [chunk | usage for piece in batch for chunk in self._chunks_of(piece, started)]
                if chunks:
                    yield chunks
        if self._includes_usage:
            yield [self._object([]) | {"usage": usage_body(self._generation.usage)}]

    def _chunks_of(self, piece: Piece, started: set[int]) -> Iterator[dict[str, object]]:
        if piece.index not in started:
            started.add(piece.index)
            yield self._chunk(piece.index, {"role": "assistant", "content": ""})
        if piece.text or piece.logprobs:
            yield self._chunk(piece.index, {"content": piece.text}, piece)
        if piece.finish_reason is not None:
            yield self._chunk(piece.index, {}, finish_reason=piece.finish_reason)

    def _chunk(
        self, index: int, delta: dict[str, object], piece: Piece | None = None, finish_reason: str | None = None
    ) -> dict[str, object]:
        logprobs = None
        if piece is not None and piece.logprobs:
            logprobs = chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
        return self._object([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])

    def _object(self, choices: list[dict[str, object]]) -> dict[str, object]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}
