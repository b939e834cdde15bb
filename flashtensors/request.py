"""What a caller asks for and gets: value types that cross every boundary (Python, ZeroMQ, HTTP)."""

from __future__ import annotations

import numbers
from types import NoneType, UnionType
from typing import Any, get_args

import msgspec

from .errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives that `SamplingParams.logprobs` may ask for."""

MAX_CHOICES = 128
"""Most answers that `SamplingParams.n` may ask for."""


MAX_COUNT = 2**31 - 1
"""Largest count of tokens in a parameter."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens, and when to stop.

    The order of operations on the logits: logit bias, penalties, temperature, top-k, top-p, min-p, draw.
    `temperature=0` is greedy: the first largest logit after bias and penalties.
    """

    n: int = 1
    """Answers to one prompt, each with its own random stream."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this; in (0, 1]."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest; in [0, 1]."""
    seed: int | None = None
    """Fixes the random stream, whatever else is in the batch. In float32 the text is then the same, too; in 16 bits
    products round differently in batches of other sizes, and a token may be another."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer (CTRL, 2019); > 0."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the answer; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the answer; in [-2, 2]."""
    logit_bias: dict[int, float] = {}
    """Token id to an addend in [-100, 100]."""
    logprobs: int | None = None
    """None: no logprobs. k: the chosen token's logprob and those of the k likeliest, 0 ≤ k ≤ 20.
    Taken from the softmax of the logits after bias and penalties, before temperature and truncation."""
    stop: str | list[str] = []
    """Strings that end the answer, or one; they are not part of the text. Kept as a list."""
    stop_token_ids: list[int] = []
    """Token ids that end the answer, besides the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Do not stop at the model's end-of-sequence ids (`stop_token_ids` still stop)."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the end of the context."""
    min_tokens: int = 0
    """Tokens to generate before any stop token may be chosen."""

    def __post_init__(self) -> None:
        """Check every type and range; raises `RequestError` that names the field."""
        for name, (kind, scalars) in _KINDS.items():
            value = getattr(self, name)
            if type(value) not in scalars:
                msgspec.structs.force_setattr(self, name, _convert(name, value, kind))
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        _require("n", self.n, 1 <= self.n <= MAX_CHOICES, f"between 1 and {MAX_CHOICES}")
        _require("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        _require("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "in (0, 1]")
        _require("top_k", self.top_k, 0 <= self.top_k <= MAX_COUNT, f"0 (off) or at most {MAX_COUNT}")
        _require("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0.0 < penalty <= 100.0, "in (0, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(name, value, -2.0 <= value <= 2.0, "between -2 and 2")
        for token_id, bias in self.logit_bias.items():
            _require("logit_bias", {token_id: bias}, token_id >= 0 and -100.0 <= bias <= 100.0, "between -100 and 100")
        count = self.logprobs
        _require("logprobs", count, count is None or 0 <= count <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
        _require("seed", self.seed, self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer")
        _require("stop", self.stop, len(self.stop) <= 16 and all(self.stop), "at most 16 non-empty strings")
        limit = MAX_COUNT if self.max_tokens is None else self.max_tokens
        _require("max_tokens", self.max_tokens, 1 <= limit <= MAX_COUNT, f"between 1 and {MAX_COUNT}")
        _require("min_tokens", self.min_tokens, 0 <= self.min_tokens <= limit, "between 0 and max_tokens")


def _scalars(kind: Any) -> frozenset[type]:
    """The scalars among what a field may be."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return frozenset({int, float, bool, str, NoneType}.intersection(kinds))


_KINDS = {field.name: (field.type, _scalars(field.type)) for field in msgspec.structs.fields(SamplingParams)}
"""Of each field its type, and the scalars that need no check: msgspec takes 0.5 µs for each."""


def _convert(param: str, value: object, kind: Any) -> object:
    """A copy of `value`; Python's own number where it is one of numpy's."""
    if isinstance(value, numbers.Number) and hasattr(value, "item"):
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        kinds = SamplingParams.__annotations__[param]
        raise RequestError(f"{param} is {value!r}, but it must be of type {kinds}", param=param) from error


def _require(param: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise RequestError(f"{param} is {value!r}, but it must be {allowed}", param=param)


BATCH_PRIORITY = 1
"""`EngineRequest.priority` of work whose first tokens nobody waits for."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, tokenised, on its way to the engine."""

    request_id: str
    """Unique among the requests that are alive."""
    model: str
    """Name of the model in the catalog."""
    prompt_token_ids: list[int]
    """At least one token."""
    sampling: SamplingParams
    """`sampling.stop` is applied where text is made; the engine sees only token ids."""
    priority: int = 0
    """Lower runs first; interactive traffic is 0, batch jobs are positive (`BATCH_PRIORITY`)."""
    is_streamed: bool = True
    """Whether the caller wants tokens as they come; False: each answer is one delta, at its end. Where `sampling.stop`
    has strings, tokens come all the same: only whoever makes the text can find them."""

    @property
    def is_batch(self) -> bool:
        """Whether nobody waits for its first token."""
        return self.priority > 0


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one generated position."""

    logprob: float
    """Of the token that was chosen."""
    top: list[tuple[int, float]]
    """`(token_id, logprob)` of the likeliest tokens, likeliest first; as many as were asked for."""


class SequenceDelta(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one answer; the last one of an answer carries its finish reason."""

    request_id: str
    index: int
    """Which of the `n` answers."""
    token_ids: list[int]
    """May be empty in the last delta. A stop token that ended the answer is included."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, when asked for."""
    finish_reason: str | None = None
    """`stop`, `length` or `abort`; None while the answer goes on."""
    stop_token_id: int | None = None
    """The token that ended the answer, when `finish_reason` is `stop`."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV cache was found in the prefix cache."""


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One answer to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """`stop`, `length` or `abort`; None while the answer goes on."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended the answer; None for end-of-sequence and `length`."""


class RequestOutput(msgspec.Struct, kw_only=True):
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    """None when the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    """Prompt tokens whose KV cache was found in the prefix cache."""
