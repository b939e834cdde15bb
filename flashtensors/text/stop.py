"""Find stop strings in text that comes in pieces (Knuth, Morris and Pratt, 1977): O(1) amortised per character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string that was found."""

    stop: str
    end: int
    """Where it ends, counted from the start of the piece that completed it; it may begin in an earlier piece."""


class StopMatcher:
    """Reads text and reports the first stop string to be completed; of two that end together, the longer.

    `num_held` is the length of the longest suffix of the text so far with which some stop string begins: what must not
    be shown yet.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._automata = [_Automaton(text) for text in sorted(set(stop), key=len, reverse=True)]
        self.num_held = 0

    def feed(self, piece: str) -> StopMatch | None:
        """Read `piece`, up to the end of the first match; do not feed after a match."""
        for position, character in enumerate(piece):
            for automaton in self._automata:
                if automaton.advance(character):
                    return StopMatch(automaton.text, position + 1)
        self.num_held = max((automaton.num_matched for automaton in self._automata), default=0)
        return None


class _Automaton:
    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fallbacks = _fallbacks(text)

    def advance(self, character: str) -> bool:
        """Read one character; True when it completes the text."""
        while self.num_matched and character != self.text[self.num_matched]:
            self.num_matched = self._fallbacks[self.num_matched - 1]
        if character == self.text[self.num_matched]:
            self.num_matched += 1
        return self.num_matched == len(self.text)


def _fallbacks(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    fallbacks = [0] * len(text)
    matched = 0
    for position in range(1, len(text)):
        while matched and text[position] != text[matched]:
            matched = fallbacks[matched - 1]
        matched += text[position] == text[matched]
        fallbacks[position] = matched
    return fallbacks
