"""Lists in pages, as OpenAI cuts them: `after` an id, at most `limit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ...errors import RequestError

_Item = TypeVar("_Item")


def page_body(
    items: Sequence[_Item],
    query: Mapping[str, str],
    *,
    default_limit: int,
    max_limit: int,
    id_of: Callable[[_Item], str],
    body_of: Callable[[_Item], dict[str, object]],
) -> dict[str, object]:
    """The page of `items` that the query asks for; raises `RequestError` for a limit or id that is none."""
    start = 0
    if after := query.get("after"):
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise RequestError(f"after is {after[:100]!r}, which is not in this list", param="after")
        start = ids.index(after) + 1
    limit = _limit(query.get("limit"), default_limit, max_limit)
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": [body_of(item) for item in page],
        "first_id": id_of(page[0]) if page else None,
        "last_id": id_of(page[-1]) if page else None,
        "has_more": start + limit < len(items),
    }


def _limit(text: str | None, default: int, largest: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:10]) <= largest):
        raise RequestError(f"limit is {text[:20]!r}, but it must be between 1 and {largest}", param="limit")
    return int(text)
