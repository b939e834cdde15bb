"""How much CPU time and memory one rendering of a template may use."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import TypeVar

from jinja2.exceptions import SecurityError

MAX_VALUE_SIZE = 4 * 2**20
"""Most characters and elements in one value, nested ones counted each time they occur."""

MAX_BUILT_SIZE = 64 * 2**20
"""Most characters and elements that one rendering may build altogether."""

_MAX_INTEGER_BITS = 4096

_Value = TypeVar("_Value")


class RenderBudget:
    """What one rendering has used so far; every check raises jinja's `SecurityError`.

    Time is CPU time of the calling thread, so a busy machine does not fail honest templates.
    """

    def __init__(self, cpu_time_s: float) -> None:
        self._cpu_time_s = cpu_time_s
        self._deadline_s = time.thread_time() + cpu_time_s
        self._built_size = 0
        self._weights: dict[int, tuple[object, int]] = {}  # the object is kept, so that its id stays its own

    def tick(self) -> None:
        """Refuse to go on after the deadline."""
        if time.thread_time() > self._deadline_s:
            raise SecurityError(f"it ran for more than {self._cpu_time_s:g} s of CPU time; does a loop never end?")

    def admit(self, size: int) -> None:
        """Refuse a value of `size` characters and elements before it is built."""
        if size > MAX_VALUE_SIZE:
            raise SecurityError(f"it builds a value of more than {MAX_VALUE_SIZE} characters or elements")

    def built(self, value: _Value) -> _Value:
        """`value` itself, weighed and counted."""
        self.tick()
        self.admit(self.weigh(value))
        self._built_size += len(value) if isinstance(value, str | bytes | Collection) else 1
        if self._built_size > MAX_BUILT_SIZE:
            raise SecurityError(f"it builds more than {MAX_BUILT_SIZE} characters and elements in all")
        return value

    def weigh(self, value: object) -> int:
        """Characters and elements of `value`, nested ones counted each time they occur."""
        if isinstance(value, str | bytes | range):
            return len(value)
        if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
            raise SecurityError(f"it computes a number of more than {_MAX_INTEGER_BITS} bits")
        if not isinstance(value, Collection):
            return 1
        known = self._weights.get(id(value))
        if known is not None:
            return known[1]
        weight = 1
        for child in chain(value.keys(), value.values()) if isinstance(value, Mapping) else value:
            weight += self.weigh(child)
            self.admit(weight)
        self._weights[id(value)] = (value, weight)
        return weight

    def admit_power(self, base: int, exponent: int) -> None:
        """Refuse an integer power whose result would have too many bits."""
        if base.bit_length() * abs(exponent) > _MAX_INTEGER_BITS:
            raise SecurityError(f"it computes a number of more than {_MAX_INTEGER_BITS} bits")

    def gather(self, items: Iterable[object], separator_size: int) -> list[str]:
        """The items as text, refused once they and their separators are too much for one value."""
        texts: list[str] = []
        size = 0
        for item in items:
            texts.append(self.text(item))
            size += len(texts[-1]) + separator_size
            self.admit(size)
            self.tick()
        return texts

    def text(self, value: object) -> str:
        """`value` as a template prints it."""
        self.weigh(value)
        return str(value)
