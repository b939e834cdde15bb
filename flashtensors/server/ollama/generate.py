"""`POST /api/generate` and `POST /api/chat`: text, or with nothing to say, loading and unloading."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from starlette.responses import Response

from ...errors import UnsupportedField
from ...request import SamplingParams, TokenLogprobs
from ..bodies import parse_body
from ..context import Call
from ..generation import Generation
from ..logprobs import token_entries
from ..models import ServedModel
from ..responses import NDJSON, json_response, open_stream
from .schema import (
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_GENERATE,
    ChatRequest,
    GenerateRequest,
)
from .timings import timestamp, usage_fields

TextField = Callable[[str], dict[str, object]]


async def generate(call: Call) -> Response:
    """Answer one prompt, through the model's chat template unless `raw`."""
    body = parse_body(call.body, GenerateRequest, UNSUPPORTED_IN_GENERATE)
    sampling, variables = body.sampling_params(), body.template_variables()
    model = await call.server.models.open(body.model)
    if not body.prompt:
        return await _load_only(call, body, model, _response_field)
    if body.raw or not model.tokenizer.has_chat_template:
        if body.system:
            raise UnsupportedField("system needs a chat template, and this prompt is used as it is", param="system")
        prompt = await asyncio.to_thread(model.tokenizer.encode, body.prompt)
        model.check_prompt(prompt, param="prompt")
    else:
        messages: list[dict[str, object]] = [{"role": "user", "content": body.prompt}]
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})
        prompt = await model.encode_chat(messages, variables, param="prompt")
    return await _answer(call, body, model, prompt, sampling, _response_field)


async def chat(call: Call) -> Response:
    """Answer a conversation."""
    body = parse_body(call.body, ChatRequest, UNSUPPORTED_IN_CHAT)
    sampling, variables = body.sampling_params(), body.template_variables()
    messages = body.template_messages()
    model = await call.server.models.open(body.model)
    if not messages:
        return await _load_only(call, body, model, _message_field)
    prompt = await model.encode_chat(messages, variables)
    return await _answer(call, body, model, prompt, sampling, _message_field)


def _response_field(text: str) -> dict[str, object]:
    return {"response": text}


def _message_field(text: str) -> dict[str, object]:
    return {"message": {"role": "assistant", "content": text}}


async def _load_only(
    call: Call, body: GenerateRequest | ChatRequest, model: ServedModel, text_field: TextField
) -> Response:
    if body.keep_alive_s == 0:
        await call.server.models.supervisor.unload(model.name)
        reason = "unload"
    else:
        await call.server.models.ensure_loaded(model, keep_alive_s=body.keep_alive_s)
        reason = "load"
    return json_response(
        {"model": body.model, "created_at": timestamp(), **text_field(""), "done": True, "done_reason": reason}
    )


async def _answer(
    call: Call,
    body: GenerateRequest | ChatRequest,
    model: ServedModel,
    prompt: list[int],
    sampling: SamplingParams,
    text_field: TextField,
) -> Response:
    generation = Generation(
        call.server.models, call.server.metrics, model, [prompt], sampling, keep_alive_s=body.keep_alive_s
    )
    objects = _objects(generation, body.model, text_field)
    if body.stream:
        return await open_stream(objects, NDJSON)
    return json_response(await _joined(objects, text_field))


async def _objects(generation: Generation, model_name: str, text_field: TextField) -> AsyncGenerator[dict[str, object]]:
    """One object for each piece of text, and a last one with the reason, the counts and the durations."""
    started_s, reason = time.monotonic(), "stop"
    async with contextlib.aclosing(generation.pieces()) as batches:
        async for batch in batches:
            for piece in batch:
                reason = piece.finish_reason or reason
                if piece.text or piece.logprobs:
                    logprobs = _logprobs(generation, piece.token_ids, piece.logprobs)
                    head = {"model": model_name, "created_at": timestamp()}
                    yield {**head, **text_field(piece.text), **logprobs, "done": False}
    yield {
        "model": model_name,
        "created_at": timestamp(),
        **text_field(""),
        "done": True,
        "done_reason": reason,
        **usage_fields(generation.usage, time.monotonic() - started_s),
    }


def _logprobs(
    generation: Generation, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
) -> dict[str, object]:
    if not logprobs:
        return {}
    return {"logprobs": token_entries(generation.model.tokenizer, token_ids, logprobs)}


async def _joined(objects: AsyncGenerator[dict[str, object]], text_field: TextField) -> dict[str, object]:
    text, last, logprobs = "", {}, []
    async with contextlib.aclosing(objects):
        async for last in objects:
            message = last.get("message")
            text += str(message["content"] if isinstance(message, dict) else last["response"])
            positions = last.get("logprobs")
            logprobs += positions if isinstance(positions, list) else []
    return {**last, **text_field(text)} | ({"logprobs": logprobs} if logprobs else {})
