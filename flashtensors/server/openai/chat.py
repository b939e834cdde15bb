"""`POST /v1/chat/completions`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator

from starlette.responses import Response

from ..answers import FullAnswer, collect_answers
from ..bodies import parse_body
from ..context import Call
from ..generation import Generation, Piece
from ..logprobs import chat_logprobs
from ..responses import SSE, json_response, open_stream
from .schema import UNSUPPORTED_IN_CHAT, ChatRequest
from .usage import usage_body


async def create_chat_completion(call: Call) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    body = parse_body(call.body, ChatRequest, UNSUPPORTED_IN_CHAT)
    sampling, includes_usage = body.sampling_params(), body.includes_usage
    messages, variables = body.template_messages(), body.template_variables()
    model = await call.server.models.open(body.model)
    model.check_sampling(sampling)
    prompt = await model.encode_chat(messages, variables)
    generation = Generation(
        call.server.models, call.server.metrics, model, [prompt], sampling, keep_alive_s=body.keep_alive_s
    )
    chat = _Chat(f"chatcmpl-{call.request_id}", body.model, generation)
    if body.stream:
        return await open_stream(chat.chunks(includes_usage), SSE)
    return json_response(chat.completion(await collect_answers(generation, sampling.n)))


class _Chat:
    """Shapes one generation as a chat completion."""

    def __init__(self, completion_id: str, model_name: str, generation: Generation) -> None:
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._head: dict[str, object] = {"id": completion_id, "created": int(time.time()), "model": model_name}

    def completion(self, answers: list[FullAnswer]) -> dict[str, object]:
        """The whole answer."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": answer.index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": chat_logprobs(self._tokenizer, answer.token_ids, answer.logprobs)
                    if answer.logprobs
                    else None,
                    "finish_reason": answer.finish_reason,
                }
                for answer in answers
            ],
            "usage": usage_body(self._generation.usage),
        }

    async def chunks(self, includes_usage: bool) -> AsyncGenerator[object]:
        """For each answer a chunk with the role, chunks with text, and one with the finish reason."""
        started: set[int] = set()
        usage: dict[str, object] = {"usage": None} if includes_usage else {}
        async with contextlib.aclosing(self._generation.pieces()) as batches:
            async for batch in batches:
                for piece in batch:
                    if piece.index not in started:
                        started.add(piece.index)
                        yield self._chunk(piece.index, {"role": "assistant", "content": ""}) | usage
                    if piece.text or piece.logprobs:
                        yield self._chunk(piece.index, {"content": piece.text}, piece) | usage
                    if piece.finish_reason is not None:
                        yield self._chunk(piece.index, {}, finish_reason=piece.finish_reason) | usage
        if includes_usage:
            yield self._object([]) | {"usage": usage_body(self._generation.usage)}

    def _chunk(
        self, index: int, delta: dict[str, object], piece: Piece | None = None, finish_reason: str | None = None
    ) -> dict[str, object]:
        logprobs = None
        if piece is not None and piece.logprobs:
            logprobs = chat_logprobs(self._tokenizer, piece.token_ids, piece.logprobs)
        return self._object([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])

    def _object(self, choices: list[dict[str, object]]) -> dict[str, object]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}
