"""Bodies of the OpenAI routes: the fields we serve, and the known ones that we do not.

`user`, `metadata`, `safety_identifier` and `prompt_cache_key` label a request for its sender and by definition do not
change the answer; they are accepted. Everything else that is not served is refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...config import parse_keep_alive
from ...errors import RequestError, UnsupportedField
from ...request import SamplingParams
from ..bodies import ANY, Unsupported

_LABELS: Unsupported = {"user": ANY, "metadata": ANY, "safety_identifier": ANY, "prompt_cache_key": ANY}

UNSUPPORTED_IN_CHAT: Unsupported = {
    **_LABELS,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of `/v1/chat/completions` that are not served, with the values that change nothing."""

UNSUPPORTED_IN_COMPLETIONS: Unsupported = {
    **_LABELS,
    "echo": (False,),
    "suffix": ("",),
}
"""Fields of `/v1/completions` that are not served, with the values that change nothing."""


_RESERVED_VARIABLES = frozenset({"self", "messages", "tools", "add_generation_prompt", "documents"})


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a stream ends."""

    include_usage: bool = False
    """A last chunk without choices carries the usage."""
    include_obfuscation: Literal[False] = False
    """Padding against traffic analysis is not served."""


class _Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both routes share. The fields from `top_k` on are extensions, in vLLM's and Ollama's spelling."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] = []
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    keep_alive: int | float | str | None = None

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The sampling parameters asked for; raises `RequestError` that names the field."""
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's spelling of off
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
        )

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds of `keep_alive`; None when it was not sent."""
        return None if self.keep_alive is None else parse_keep_alive(self.keep_alive, 0.0)

    @property
    def includes_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        return self.stream_options is not None and self.stream_options.include_usage


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation; one that the client took from an answer comes with all fields of answers."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    tool_calls: list[object] | None = None
    tool_call_id: str | None = None
    function_call: None = None
    annotations: list[object] | None = None
    """What the text of an answer refers to; templates are not given it."""
    parsed: None = None


class ChatRequest(_Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] = {}
    """Extension: variables for the model's chat template, for example `{"enable_thinking": false}`."""

    def sampling_params(self) -> SamplingParams:
        """The sampling parameters asked for."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def template_variables(self) -> dict[str, Any]:
        """`chat_template_kwargs`, checked for names that the request sets elsewhere."""
        for name in self.chat_template_kwargs:
            if name in _RESERVED_VARIABLES:
                raise RequestError(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")
        return self.chat_template_kwargs

    def template_messages(self) -> list[dict[str, object]]:
        """The messages as chat templates expect them: text content, `developer` under its older name `system`."""
        if not self.messages:
            raise RequestError("messages is empty; send at least one", param="messages")
        return [_template_message(message, f"messages[{number}]") for number, message in enumerate(self.messages)]


def _template_message(message: ChatMessage, where: str) -> dict[str, object]:
    if message.role in ("tool", "function") or message.tool_calls or message.tool_call_id:
        raise UnsupportedField(f"{where}: tool calls are not supported by this server", param=where)
    if message.content is None:
        raise RequestError(f"{where}.content is missing", param=f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, object] = {"role": role, "content": _text_of(message.content, f"{where}.content")}
    if message.name is not None:
        fields["name"] = message.name
    return fields


def _text_of(content: str | list[ContentPart], where: str) -> str:
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise UnsupportedField(
                f"{where}[{number}] is of type {part.type[:50]!r}, but this server reads text only",
                param=f"{where}[{number}].type",
            )
    return "\n".join(part.text or "" for part in content)


class CompletionRequest(_Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    """A text, a list of texts, token ids, or a list of token ids."""
    max_tokens: int | None = 16
    logprobs: int | None = None
    best_of: int = 1
    """Answers of which the best `n` are sent; choosing is not served, so it may only be 1, its default, or `n`."""

    def sampling_params(self) -> SamplingParams:
        """The sampling parameters asked for."""
        if self.best_of not in (1, self.n):
            text = "best_of is not supported by this server; leave it out or send the value of n"
            raise UnsupportedField(text, param="best_of")
        return self.sampling(max_tokens=self.max_tokens, logprobs=self.logprobs)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids; raises `RequestError` for an empty or mixed list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(item) for item in self.prompt}
        if kinds == {int}:
            return [[item for item in self.prompt if isinstance(item, int)]]
        if kinds in ({str}, {list}):
            return [item for item in self.prompt if not isinstance(item, int)]
        raise RequestError(
            "prompt must be a text, a non-empty list of texts, a list of token ids, or a list of such lists",
            param="prompt",
        )
