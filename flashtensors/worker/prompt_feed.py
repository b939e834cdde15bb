"""Prompts on their way to the engine: matched with their parameters, and tokenised ahead in a thread."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..errors import RequestError
from ..request import SamplingParams
from ..text.tokenizer import Tokenizer

FIRST_CHUNK, MAX_CHUNK = 16, 512
"""Prompts that are tokenised together: few at first, so that the engine starts at once."""

_Prompt = TypeVar("_Prompt")
_MISSING = object()


def zip_sampling(
    prompts: Iterable[_Prompt],
    sampling_params: SamplingParams | Iterable[SamplingParams] | None,
    *,
    total: int | None = None,
) -> Iterator[tuple[_Prompt, SamplingParams]]:
    """Pairs of prompt and parameters, drawn as they are needed.

    Args:
        prompts: The prompts.
        sampling_params: For all of them, or one for each; None: the defaults.
        total: How many prompts there are, where `prompts` does not say.

    Raises:
        RequestError: There are fewer or more parameters than prompts; at once where both have a length.
    """
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return zip(prompts, itertools.repeat(sampling_params or SamplingParams()), strict=False)
    num_prompts = len(prompts) if isinstance(prompts, Sequence) else total
    if isinstance(sampling_params, Sequence) and num_prompts not in (None, len(sampling_params)):
        raise _mismatch(f"{len(sampling_params)}", f"{num_prompts}")
    return _zip_equal(prompts, sampling_params)


def _zip_equal(
    prompts: Iterable[_Prompt], sampling_params: Iterable[SamplingParams]
) -> Iterator[tuple[_Prompt, SamplingParams]]:
    params = iter(sampling_params)
    count = 0
    for prompt in prompts:
        sampling = next(params, _MISSING)
        if not isinstance(sampling, SamplingParams):
            raise _mismatch(f"{count}", "more")
        yield prompt, sampling
        count += 1
    if next(params, _MISSING) is not _MISSING:
        raise _mismatch("more", f"{count}")


def _mismatch(num_params: str, num_prompts: str) -> RequestError:
    return RequestError(
        f"there are {num_params} sampling_params for {num_prompts} prompts; give one, or one for each",
        param="sampling_params",
    )


def tokenize_ahead(
    pairs: Iterator[tuple[str | Sequence[int], SamplingParams]], tokenizer: Tokenizer, *, adds_special_tokens: bool
) -> Generator[tuple[str | None, list[int], SamplingParams]]:
    """Text (None where a prompt came as ids), token ids and parameters of each prompt, in order.

    `pairs` is drawn from on the caller's thread, a chunk ahead of what is yielded; the tokeniser works in another,
    where it holds up neither the caller nor the engine.
    """

    def encode(chunk: list[tuple[str | Sequence[int], SamplingParams]]) -> list[list[int]]:
        texts = [prompt for prompt, _ in chunk if isinstance(prompt, str)]
        encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=adds_special_tokens))
        return [next(encoded) if isinstance(prompt, str) else list(prompt) for prompt, _ in chunk]

    size = FIRST_CHUNK
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        chunk = list(itertools.islice(pairs, size))
        encoding = thread.submit(encode, chunk)
        while chunk:
            size = min(MAX_CHUNK, 2 * size)
            next_chunk = list(itertools.islice(pairs, size))
            next_encoding = thread.submit(encode, next_chunk)
            for (prompt, sampling), token_ids in zip(chunk, encoding.result(), strict=True):
                yield prompt if isinstance(prompt, str) else None, token_ids, sampling
            chunk, encoding = next_chunk, next_encoding
