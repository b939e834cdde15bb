"""Collecting the pieces of a generation for routes that answer all at once."""

from __future__ import annotations

import contextlib
import dataclasses

from ..request import TokenLogprobs
from .generation import Generation


@dataclasses.dataclass(slots=True)
class FullAnswer:
    """One whole answer."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None


async def collect_answers(generation: Generation, num_answers: int) -> list[FullAnswer]:
    """Run a generation to its end; cancellation aborts it at the worker."""
    answers = [FullAnswer(index) for index in range(num_answers)]
    async with contextlib.aclosing(generation.pieces()) as pieces:
        async for batch in pieces:
            for piece in batch:
                answer = answers[piece.index]
                answer.text += piece.text
                answer.token_ids += piece.token_ids
                answer.logprobs += piece.logprobs or []
                answer.finish_reason = piece.finish_reason
    return answers
