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
from ..generation import Generation
from ..logprobs import CompletionLogprobs
from ..models import ServedModel
from ..responses import SSE, json_response, open_stream
from .schema import UNSUPPORTED_IN_COMPLETIONS, CompletionRequest
from .usage import usage_body

MAX_ANSWERS = 1024
"""Most answers to all prompts of one request together."""


async def create_completion(call: Call) -> Response:
    """Continue one or several prompts, whole or as a stream of chunks."""
    body = parse_body(call.body, CompletionRequest, UNSUPPORTED_IN_COMPLETIONS)
    sampling, includes_usage = body.sampling_params(), body.includes_usage
    prompts = body.prompts()
    num_answers = len(prompts) * sampling.n
    if num_answers > MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts with n={sampling.n} make {num_answers} answers, but a request may have "
            f"{MAX_ANSWERS}; send several requests",
            param="prompt",
        )
    model = await call.server.models.open(body.model)
    model.check_sampling(sampling)
    token_ids = await asyncio.to_thread(_encode, model, prompts)
    generation = Generation(
        call.server.models, call.server.metrics, model, token_ids, sampling, keep_alive_s=body.keep_alive_s
    )
    completion = _Completion(f"cmpl-{call.request_id}", body.model, generation)
    if body.stream:
        return await open_stream(completion.chunks(includes_usage), SSE)
    return json_response(completion.whole(await collect_answers(generation, num_answers)))


def _encode(model: ServedModel, prompts: list[str | list[int]]) -> list[list[int]]:
    encoded = [model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for token_ids in encoded:
        model.check_prompt(token_ids, param="prompt")
    return encoded


class _Completion:
    """Shapes one generation as a text completion."""

    def __init__(self, completion_id: str, model_name: str, generation: Generation) -> None:
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._head: dict[str, object] = {
            "id": completion_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, answers: list[FullAnswer]) -> dict[str, object]:
        """The whole answer."""
        choices = [
            {
                "index": answer.index,
                "text": answer.text,
                "logprobs": CompletionLogprobs(self._tokenizer).next(answer.token_ids, answer.logprobs)
                if answer.logprobs
                else None,
                "finish_reason": answer.finish_reason,
            }
            for answer in answers
        ]
        return {**self._head, "choices": choices, "usage": usage_body(self._generation.usage)}

    async def chunks(self, includes_usage: bool) -> AsyncGenerator[object]:
        """A chunk for each piece with text, logprobs or a finish reason."""
        logprobs: dict[int, CompletionLogprobs] = {}
        usage: dict[str, object] = {"usage": None} if includes_usage else {}
        async with contextlib.aclosing(self._generation.pieces()) as batches:
            async for batch in batches:
                for piece in batch:
                    if not (piece.text or piece.logprobs or piece.finish_reason):
                        continue
                    choice: dict[str, object] = {"index": piece.index, "text": piece.text, "logprobs": None}
                    if piece.logprobs:
                        shape = logprobs.setdefault(piece.index, CompletionLogprobs(self._tokenizer))
                        choice["logprobs"] = shape.next(piece.token_ids, piece.logprobs)
                    choice["finish_reason"] = piece.finish_reason
                    yield {**self._head, "choices": [choice]} | usage
        if includes_usage:
            yield {**self._head, "choices": [], "usage": usage_body(self._generation.usage)}
