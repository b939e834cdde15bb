"""Bodies of the Ollama routes: the fields we serve, and the known ones that we do not."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...config import parse_keep_alive
from ...errors import RequestError, UnsupportedField
from ...request import SamplingParams
from ..bodies import Unsupported
from ..pulls import PullCall

UNSUPPORTED_IN_GENERATE: Unsupported = {
    "context": ([],),
    "format": ("",),
    "height": (),
    "images": ([],),
    "steps": (),
    "suffix": ("",),
    "template": ("",),
    "width": (),
}
"""Fields of `/api/generate` that are not served, with the values that change nothing."""

UNSUPPORTED_IN_CHAT: Unsupported = {"format": ("",), "tools": ([],)}
"""Fields of `/api/chat` that are not served, with the values that change nothing."""

UNSUPPORTED_IN_PULL: Unsupported = {"username": ("",), "password": ("",)}
"""Fields of `/api/pull` that Ollama's own command sends, with the values that change nothing."""

DEFAULT_TEMPERATURE, DEFAULT_TOP_K, DEFAULT_TOP_P = 0.8, 40, 0.9
"""What Ollama samples with when a request does not say."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling options in Ollama's spelling. Runner options (`num_ctx`, `num_gpu` …) are settings of this daemon."""

    temperature: float = DEFAULT_TEMPERATURE
    top_k: int = DEFAULT_TOP_K
    top_p: float = DEFAULT_TOP_P
    min_p: float = 0.0
    seed: int | None = None
    num_predict: int = -1
    """Most tokens to generate; -1 and -2: to the end of the context."""
    stop: str | list[str] = []
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def sampling(self, logprobs: int | None) -> SamplingParams:
        """The sampling parameters asked for; raises `RequestError` that names the field."""
        if self.num_predict < -2 or self.num_predict == 0:
            raise RequestError(
                f"num_predict is {self.num_predict}, but it must be positive, or -1 for no limit", param="num_predict"
            )
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(0, self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            max_tokens=self.num_predict if self.num_predict > 0 else None,
            logprobs=logprobs,
        )


class _Generating(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both generating routes share."""

    model: str
    stream: bool = True
    options: dict[str, object] = {}
    keep_alive: int | float | str | None = None
    think: bool | str | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def sampling_params(self) -> SamplingParams:
        """The sampling parameters asked for; an option that is not served is refused by name."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        given = {name: value for name, value in self.options.items() if value is not None}
        for name in given:
            if name not in Options.__struct_fields__:
                served = ", ".join(Options.__struct_fields__)
                raise UnsupportedField(
                    f"option {name[:100]!r} is not supported; the options are {served}", param=name[:100]
                )
        try:
            options = msgspec.convert(given, Options)
        except msgspec.ValidationError as error:
            raise RequestError(f"invalid options: {error}", param="options") from error
        return options.sampling((self.top_logprobs or 0) if self.logprobs else None)

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds of `keep_alive`; None when it was not sent."""
        return None if self.keep_alive is None else parse_keep_alive(self.keep_alive, 0.0)

    def template_variables(self) -> dict[str, Any]:
        """`think: false` for templates that know it; separating thoughts from the answer is not served."""
        if self.think is None:
            return {}
        if self.think is not False:
            raise UnsupportedField("think is not supported by this server; leave it out or send false", param="think")
        return {"enable_thinking": False}


class GenerateRequest(_Generating, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /api/generate`."""

    prompt: str = ""
    system: str = ""
    raw: bool = False
    """Take the prompt as it is, without the model's chat template."""


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[object] | None = None
    tool_name: str | None = None


class ChatRequest(_Generating, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /api/chat`."""

    messages: list[Message] = []

    def template_messages(self) -> list[dict[str, object]]:
        """The messages as chat templates expect them."""
        for number, message in enumerate(self.messages):
            for name in ("images", "tool_calls", "tool_name", "thinking"):
                if getattr(message, name):
                    where = f"messages[{number}].{name}"
                    raise UnsupportedField(f"{where} is not supported by this server; leave it out", param=where)
            if message.role == "tool":
                where = f"messages[{number}].role"
                raise UnsupportedField(f"{where} 'tool' is not supported by this server", param=where)
        return [{"role": message.role, "content": message.content} for message in self.messages]


class NamedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `/api/show` and `/api/delete`: `model`, or `name` as older clients say."""

    model: str = ""
    name: str = ""
    verbose: bool = False

    @property
    def model_name(self) -> str:
        """The model that is meant."""
        return _one_name(self.model, self.name)


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /api/load`, an extension: load with progress, pin, keep-alive, or into host memory only."""

    model: str
    stream: bool = True
    keep_alive: int | float | str | None = None
    is_pinned: bool = False
    tier: Literal["device", "host"] = "device"

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds of `keep_alive`; None when it was not sent."""
        return None if self.keep_alive is None else parse_keep_alive(self.keep_alive, 0.0)


class PullRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /api/pull`; the last five fields are extensions."""

    model: str = ""
    name: str = ""
    stream: bool = True
    insecure: bool = False
    revision: str | None = None
    token: str | None = None
    force: bool = False
    quantization: str | None = None
    listed_as: str | None = None
    """What the model is to be called here; `name` is `model` in the words of older clients."""

    def call(self) -> PullCall:
        """What to pull; raises for `insecure`, which is not served."""
        if self.insecure:
            raise UnsupportedField("insecure is not supported: models are pulled over HTTPS", param="insecure")
        reference = _one_name(self.model, self.name)
        return PullCall(
            reference=reference,
            revision=self.revision,
            token=self.token,
            force=self.force,
            name=self.listed_as,
            quantization=self.quantization,
        )


def _one_name(model: str, name: str) -> str:
    if not (model or name):
        raise RequestError("model is missing; name the model", param="model")
    return model or name
