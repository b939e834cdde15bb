"""Typed, range-checked reading of the JSON object in a `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from ..errors import CheckpointError

MAX_SIZE = 2**31 - 1
"""Largest number of things that a configuration may state."""


class ConfigFields:
    """The keys of one JSON object; every getter raises `CheckpointError` naming file, key, value and range.

    Args:
        values: The object as decoded.
        defaults: Values of keys that are absent, as the architecture defines them.
        where: What messages call the object.
    """

    def __init__(self, values: Mapping[str, object], *, defaults: Mapping[str, object], where: str) -> None:
        self._values = {**defaults, **values}
        self.where = where

    def fail(self, key: str, allowed: str) -> NoReturn:
        """Raise for the value of `key`."""
        value = repr(self._values.get(key))
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise CheckpointError(
            f"{self.where}: {key} is {shown}, but it must be {allowed}; the file is damaged, pull it again"
        )

    def keys(self) -> list[str]:
        """Every key that is there."""
        return list(self._values)

    def find(self, key: str) -> object:
        """The value as it stands; None when absent."""
        return self._values.get(key)

    def size(self, key: str, *, maximum: int = MAX_SIZE) -> int:
        """A number of things: a positive int."""
        value = self._values.get(key)
        if type(value) is not int or not 0 < value <= maximum:
            self.fail(key, f"a whole number from 1 to {maximum}")
        return value

    def find_size(self, key: str) -> int | None:
        """As `size`; None when absent or null."""
        return None if self._values.get(key) is None else self.size(key)

    def positive(self, key: str) -> float:
        """A finite number above 0."""
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, "a number")
        if not (0 < value < 2**63 and math.isfinite(value)):
            self.fail(key, "a finite number above 0")
        return float(value)

    def find_positive(self, key: str) -> float | None:
        """As `positive`; None when absent or null."""
        return None if self._values.get(key) is None else self.positive(key)

    def flag(self, key: str) -> bool:
        """A boolean; False when absent or null."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false")
        return bool(value)

    def find_text(self, key: str) -> str | None:
        """A string; None when absent or null."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(key, "text")
        return value

    def find_object(self, key: str, *, defaults: Mapping[str, object] | None = None) -> ConfigFields | None:
        """A nested object; None when absent or null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, "an object")
        return ConfigFields(value, defaults=defaults or {}, where=f"{self.where}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """Ids given as an int or as a list; None when absent or null."""
        value = self._values.get(key)
        if value is None:
            return None
        ids = tuple(item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))
        is_list = isinstance(value, list) and len(ids) == len(value)
        if not (is_list or isinstance(value, int)) or any(not 0 <= item <= MAX_SIZE for item in ids):
            self.fail(key, "a token id or a list of token ids")
        return ids
