"""What a check of `flash doctor` found."""

from __future__ import annotations

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """The result of one check."""

    check: str
    status: str
    """`ok`, `warning` or `error`."""
    text: str
