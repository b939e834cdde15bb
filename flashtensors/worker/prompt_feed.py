"""Prompts on their way to the engine: matched with their parameters, and tokenised ahead in a thread."""

from __future__ import annotations

import contextlib
import itertools
import operator
import reprlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, Mapping) or not isinstance(sampling_params, Iterable):
        return ((prompt, check_params(sampling_params)) for prompt in prompts)
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
        if sampling is _MISSING:
            raise _mismatch(f"{count}", "more")
        yield prompt, check_params(sampling)
        count += 1
    if next(params, _MISSING) is not _MISSING:
        raise _mismatch("more", f"{count}")


def _mismatch(num_params: str, num_prompts: str) -> RequestError:
    return RequestError(
        f"there are {num_params} sampling_params for {num_prompts} prompts; give one, or one for each",
        param="sampling_params",
    )


def check_params(sampling: object) -> SamplingParams:
    """`sampling`; raises `RequestError` where it is something else than parameters."""
    if isinstance(sampling, SamplingParams):
        return sampling
    raise RequestError(
        f"sampling_params is {reprlib.repr(sampling)}; pass SamplingParams, such as SamplingParams(max_tokens=16)",
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
        return [next(encoded) if isinstance(prompt, str) else to_token_ids(prompt) for prompt, _ in chunk]

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


def to_token_ids(prompt: Sequence[int]) -> list[int]:
    """The ids of a prompt that is not text; raises `RequestError` where it is anything but a sequence of ints."""
    is_sequence = hasattr(prompt, "__getitem__") and not isinstance(prompt, bytes | bytearray | memoryview | Mapping)
    with contextlib.suppress(TypeError):
        if is_sequence and bool not in map(type, prompt):
            return [*map(operator.index, prompt)]
    raise RequestError(
        f"a prompt is {reprlib.repr(prompt)}; pass text or a sequence of token ids, such as 'Hello' or [5, 9, 7]",
        param="prompt",
    )
