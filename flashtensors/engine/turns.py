"""In which order requests are served.

Interactive requests (priority 0 or better) come first, first served. A level of priority is worth `PRIORITY_STRIDE`
arrivals: a batch request ranks as if it had come so many requests later, so that it waits for those that come while it
waits, but never for ever. Batch requests that arrive within one stride of another may change places among themselves:
those whose prompts begin alike come together, so that the beginning is computed once and read together; otherwise those
with the longest answers come first, so that none of them is left over alone at the end.
"""

from __future__ import annotations

from ..request import EngineRequest

PRIORITY_STRIDE = 1024
"""Later requests that one level of priority is worth, and batch requests that are sorted together."""

PREFIX_TOKENS = 256
"""Prompts that are equal so far begin alike."""

Turn = tuple[int, int, int, int, int]
"""Place of a request; lower is earlier. The last entry is unlike any other request's."""

Rank = tuple[int, int, int, int, int, int]
"""Place of a sequence: its request's turn and its index."""

_PREFERRED = -(2**62)


class Turns:
    """Gives requests their turns."""

    def __init__(self) -> None:
        self._num_requests = 0
        self._window = -1
        self._longest: dict[tuple[int, int], int] = {}  # first answer of each (priority, prefix) in this window

    def next(self, request: EngineRequest, num_answer_tokens: int) -> Turn:
        """The turn of a request that comes now, whose answers have at most so many tokens."""
        arrival = self._num_requests
        self._num_requests += 1
        if request.priority <= 0:
            return (arrival + request.priority * PRIORITY_STRIDE, 0, 0, 0, arrival)
        window = arrival // PRIORITY_STRIDE
        if window != self._window:
            self._window, self._longest = window, {}
        prefix = hash(tuple(request.prompt_token_ids[:PREFIX_TOKENS]))
        longest = self._longest.setdefault((request.priority, prefix), num_answer_tokens)
        return ((window + request.priority) * PRIORITY_STRIDE, -longest, prefix, -num_answer_tokens, arrival)


def preferred(rank: Rank) -> Rank:
    """The rank of a sequence that has given way: ahead of those it may change places with."""
    return (rank[0], _PREFERRED, *rank[2:])
