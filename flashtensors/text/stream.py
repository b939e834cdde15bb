"""Token ids in, text out, as it can be shown to a person."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .stop import StopMatcher
from .tokenizer import Tokenizer


class TextStream:
    """The text of one answer, while its tokens come.

    Whatever pieces the tokens come in, what `push` and `flush` return adds up to `tokenizer.decode` of all of them, cut
    before the first stop string. Nothing is shown that later tokens could change: not part of a character, and not text
    with which a stop string may begin. Work per token does not grow with the length of the answer.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text; the one completed first wins, and of two that end together the longer.
        skip_special_tokens: Leave out tokens such as `<|im_end|>`.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the text."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = tokenizer.start_decoder()
        self._matcher = StopMatcher(stop) if stop else None
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._shown)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add and that no later token can change; empty once a stop string ended it."""
        if self.stopped_by is not None:
            return ""
        tokens = self._tokenizer.tokens(token_ids, skip_special_tokens=self._skip_special_tokens)
        return self._show(self._decoder.push_all(tokens))

    def flush(self) -> str:
        """The rest, when no more tokens will come; bytes that never became a character are U+FFFD."""
        if self.stopped_by is not None:
            return ""
        shown = self._show(self._decoder.flush())
        if self.stopped_by is None:
            shown += self._held
            self._shown.append(self._held)
        self._held = ""
        return shown

    def _show(self, new: str) -> str:
        text = self._held + new
        num_shown = len(text)
        if self._matcher is not None:
            match = self._matcher.feed(new)
            if match is not None:
                self.stopped_by = match.stop
                num_shown = len(self._held) + match.end - len(match.stop)
                text = text[:num_shown]
            else:
                num_shown -= self._matcher.num_held
        shown, self._held = text[:num_shown], text[num_shown:]
        self._shown.append(shown)
        return shown
