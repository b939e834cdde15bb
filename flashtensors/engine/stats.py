"""What an engine reports about itself."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State now, and counts since the engine began."""

    num_running: int
    """Answers that hold a slot."""
    num_waiting: int
    """Answers that wait, pre-empted ones among them."""
    kv_usage: float
    """Share of KV blocks held by running answers, 0 … 1."""
    num_preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Of those, tokens found."""
    num_generated: int
    """Tokens of answers, whether handed out yet or not."""
