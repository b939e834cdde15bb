"""Log probabilities in OpenAI's two shapes; Ollama took over the first."""

from __future__ import annotations

from collections.abc import Sequence

from ..request import TokenLogprobs
from ..text.tokenizer import Tokenizer


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> dict[str, object]:
    """The shape of chat completions: one entry a token, with its alternatives."""
    return {"content": token_entries(tokenizer, token_ids, logprobs), "refusal": None}


def token_entries(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, object]]:
    """`{token, logprob, bytes, top_logprobs}` for each token."""
    return [
        {
            **_entry(tokenizer, token_id, position.logprob),
            "top_logprobs": [_entry(tokenizer, other_id, logprob) for other_id, logprob in position.top],
        }
        for token_id, position in zip(token_ids, logprobs, strict=True)
    ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, -9999.0),  # JSON has no infinity; OpenAI's floor
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """The shape of completions: parallel lists, with the offset of each token in the answer's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def next(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, object]:
        """The lists for the next tokens of the answer."""
        texts = [self._tokenizer.token_text(token_id) for token_id in token_ids]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(position.logprob, -9999.0) for position in logprobs],
            "top_logprobs": [
                {self._tokenizer.token_text(other_id): max(logprob, -9999.0) for other_id, logprob in position.top}
                for position in logprobs
            ],
            "text_offset": offsets,
        }
