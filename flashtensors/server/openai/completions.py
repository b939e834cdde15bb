"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from starlette.responses import Response

from ...errors import RequestError
from ..answers import FullAnswer, collect_answers
from ..bodies import parse_body
from ..context import Call
from ..generation import Generation, Piece
from ..logprobs import CompletionLogprobs
from ..metrics import Metrics
from ..models import ModelManager, ServedModel
from ..responses import SSE, json_response, open_stream
from .schema import UNSUPPORTED_IN_COMPLETIONS, CompletionRequest
from .usage import usage_body

MAX_ANSWERS = 1024
"""Most answers to all prompts of one request together."""


async def create_completion(call: Call) -> Response:
    """Continue one or several prompts, whole or as a stream of chunks."""
    answer = await open_completion(call.server.models, call.server.metrics, call.body, call.request_id)
    if answer.is_stream:
        return await open_stream(answer.chunks(), SSE)
    return json_response(await answer.whole())


async def open_completion(
    models: ModelManager, metrics: Metrics, body: bytes, request_id: str, *, priority: int = 0
) -> CompletionAnswer:
    """Check a body and its prompts; nothing runs before the answer is asked for. Raises `FlashError`."""
    request = parse_body(body, CompletionRequest, UNSUPPORTED_IN_COMPLETIONS)
    sampling, includes_usage = request.sampling_params(), request.includes_usage
    prompts = request.prompts()
    num_answers = len(prompts) * sampling.n
    if num_answers > MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts with n={sampling.n} make {num_answers} answers, but a request may have "
            f"{MAX_ANSWERS}; send several requests",
            param="prompt",
        )
    models.check_room(len(prompts), sampling.n)
    model = await models.open(request.model)
    model.check_sampling(sampling)
    token_ids = await asyncio.to_thread(_encode, model, prompts)
    generation = Generation(
        models,
        metrics,
        model,
        token_ids,
        sampling,
        keep_alive_s=request.keep_alive_s,
        priority=priority,
        is_streamed=request.stream,
    )
    return CompletionAnswer(
        f"cmpl-{request_id}", request, generation, num_answers=num_answers, includes_usage=includes_usage
    )


def _encode(model: ServedModel, prompts: list[str | list[int]]) -> list[list[int]]:
    encoded = [model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for token_ids in encoded:
        model.check_prompt(token_ids, param="prompt")
    return encoded


class CompletionAnswer:
    """One generation in the shape of a text completion.

    Args:
        completion_id: Its id.
        request: What was asked.
        generation: Makes the text.
        num_answers: To all prompts together.
        includes_usage: Whether a stream ends with the usage.
    """

    def __init__(
        self,
        completion_id: str,
        request: CompletionRequest,
        generation: Generation,
        *,
        num_answers: int,
        includes_usage: bool,
    ) -> None:
        self.is_stream = request.stream
        """Whether `chunks` was asked for, not `whole`."""
        self._num_answers = num_answers
        self._includes_usage = includes_usage
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._head: dict[str, object] = {
            "id": completion_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }

    async def whole(self) -> dict[str, object]:
        """The whole answer."""
        answers = await collect_answers(self._generation, self._num_answers)
        choices = [self._choice(answer) for answer in answers]
        return {**self._head, "choices": choices, "usage": usage_body(self._generation.usage)}

    def _choice(self, answer: FullAnswer) -> dict[str, object]:
        shape = CompletionLogprobs(self._tokenizer)
        return {
            "index": answer.index,
            "text": answer.text,
            "logprobs": shape.next(answer.token_ids, answer.logprobs) if answer.logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    async def chunks(self) -> AsyncGenerator[list[dict[str, object]]]:
        """A chunk for each piece with text, logprobs or a finish reason."""
        logprobs: dict[int, CompletionLogprobs] = {}
        usage: dict[str, object] = {"usage": None} if self._includes_usage else {}
        async with contextlib.aclosing(self._generation.pieces()) as batches:
            async for batch in batches:
                chunks = [
                    {**self._head, "choices": [self._delta(piece, logprobs)]} | usage
                    for piece in batch
                    if piece.text or piece.logprobs or piece.finish_reason
                ]
                if chunks:
                    yield chunks
        if self._includes_usage:
            yield [{**self._head, "choices": [], "usage": usage_body(self._generation.usage)}]

    def _delta(self, piece: Piece, logprobs: dict[int, CompletionLogprobs]) -> dict[str, object]:
        lists = None
        if piece.logprobs:
            shape = logprobs.setdefault(piece.index, CompletionLogprobs(self._tokenizer))
            lists = shape.next(piece.token_ids, piece.logprobs)
        return {"index": piece.index, "text": piece.text, "logprobs": lists, "finish_reason": piece.finish_reason}
