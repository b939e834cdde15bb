"""Text to token ids and back, and conversations to prompts: one model's `tokenizer.json` and the files beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from ..errors import CheckpointError, RequestError, TemplateError
from .chat_template import ChatTemplate
from .decoders import TextDecoder, parse_decoder
from .tokenizer_files import TokenizerFiles, read_tokenizer_files


class Tokenizer:
    """A model's tokenizer and chat templates. Ids and prompts equal those of transformers' fast tokenizers.

    Safe to use from several threads.

    Args:
        backend: The tokenizer proper; it is configured and owned from here on.
        files: What the files beside `tokenizer.json` say.
        where: The folder, for messages.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: TokenizerFiles, *, where: str) -> None:
        self._where = where
        self._files = files
        self._backend = _configured(backend, files)
        self._decoder_spec = parse_decoder(_decoder_json(backend), where=f"{where}/tokenizer.json")
        added_tokens = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added_tokens.items() if token.special)
        self._templates: dict[str, ChatTemplate] = {}
        self.bos_token_id = self._find_named_id("bos_token")
        """Id of the token that begins a text, or None."""
        own_eos = self._find_named_id("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys((*files.eos_token_ids, *([] if own_eos is None else [own_eos]))))
        """Ids that end an answer: those of the model's configuration, then the tokenizer's own."""

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of the model in `folder`.

        Raises:
            CheckpointError: No `tokenizer.json`, or a file that cannot be read.
            UnsupportedModel: A kind of tokenizer whose text cannot be streamed.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; a model needs it to read and write text")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever it cannot parse
            raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}; pull the model again") from error
        return cls(backend, read_tokenizer_files(folder), where=str(folder))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model may have more rows than that."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._files.chat_templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer puts around a text unless told otherwise."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # half a surrogate pair is a Python str but not Unicode text
            raise RequestError("the text holds a lone surrogate, so it is not Unicode; remove it") from error

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of many texts, by several threads outside Python; each as `encode` gives them."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise RequestError("a text holds a lone surrogate, so it is not Unicode; remove it") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; use `TextStream` for one that grows."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to a text, perhaps part of a character; empty for an id without a token."""
        token = self._backend.id_to_token(token_id)
        return self._decoder_spec.token_bytes(token) if token is not None else b""

    def token_text(self, token_id: int) -> str:
        """A token by itself as text; bytes that are not a whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def tokens(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> Iterator[str]:
        """The vocabulary's spelling of each token; ids without a token are left out."""
        for token_id in token_ids:
            token = self._backend.id_to_token(token_id)
            if token is not None and not (skip_special_tokens and token_id in self._special_ids):
                yield token

    def start_decoder(self) -> TextDecoder:
        """A decoder for the `tokens` of one sequence."""
        return self._decoder_spec.start()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt for a conversation, by the model's own template.

        Fields of a message that are None are left out, as if they were absent. `template_kwargs` (for instance
        `enable_thinking=False`) become variables of the template.

        Raises:
            TemplateError: No template, or one that fails or refuses the messages.
        """
        variables = {name: token.content for name, token in self._files.named_tokens.items()}
        variables |= {"documents": None, **template_kwargs}
        variables["messages"] = [{k: v for k, v in message.items() if v is not None} for message in messages]
        variables["tools"] = tools
        variables["add_generation_prompt"] = add_generation_prompt
        return self._chat_template(has_tools=tools is not None).render(variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of `render_chat`; the template, not the tokenizer, adds what begins a text."""
        prompt = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, **template_kwargs)
        return self.encode(prompt, add_special_tokens=False)

    def _chat_template(self, *, has_tools: bool) -> ChatTemplate:
        sources = self._files.chat_templates
        name = "tool_use" if has_tools and "tool_use" in sources else "default"
        if name not in sources:
            known = f"only templates named {', '.join(sorted(sources))}" if sources else "no chat template"
            raise TemplateError(f"{self._where}: the model has {known}; send a plain prompt to the completions route")
        if name not in self._templates:
            self._templates[name] = ChatTemplate(sources[name], where=self._where)
        return self._templates[name]

    def _find_named_id(self, name: str) -> int | None:
        token = self._files.named_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token.content)


def _configured(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """`backend` with the tokens, post-processor and settings that the files add to it."""
    backend.no_truncation()
    backend.no_padding()
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for token in files.added_tokens.values() if repr(token) not in known])
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    special = [*files.named_tokens.values(), *files.extra_special_tokens]
    backend.add_special_tokens([token for token in special if token.content not in present])
    backend.encode_special_tokens = files.splits_special_tokens
    if backend.post_processor is None:
        backend.post_processor = _post_processor(backend, files)
    return backend


def _post_processor(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> TemplateProcessing | None:
    wanted = {"bos_token": files.adds_bos, "eos_token": files.adds_eos}
    tokens = {name: files.named_tokens[name].content for name in wanted if wanted[name] and name in files.named_tokens}
    if not tokens:
        return None
    pieces = [tokens.get("bos_token"), "$A", tokens.get("eos_token")]
    return TemplateProcessing(
        single=[piece for piece in pieces if piece is not None],
        special_tokens=[(token, backend.token_to_id(token)) for token in tokens.values()],
    )


def _decoder_json(backend: tokenizers.Tokenizer) -> dict[str, Any] | None:
    return None if backend.decoder is None else json.loads(backend.decoder.__getstate__())
