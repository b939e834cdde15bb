"""Timestamps and durations in Ollama's units."""

from __future__ import annotations

import datetime
import time

from ..generation import Usage


def timestamp(unix_s: float | None = None) -> str:
    """RFC 3339 in UTC; now when None."""
    seconds = time.time() if unix_s is None else unix_s
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")


def nanoseconds(seconds: float) -> int:
    """Seconds as whole nanoseconds."""
    return round(seconds * 1e9)


def usage_fields(usage: Usage, total_s: float) -> dict[str, object]:
    """Counts and durations of the last object of an answer."""
    return {
        "total_duration": nanoseconds(total_s),
        "load_duration": nanoseconds(usage.load_s),
        "prompt_eval_count": usage.num_prompt_tokens,
        "prompt_eval_duration": nanoseconds(usage.prompt_s),
        "eval_count": usage.num_generated_tokens,
        "eval_duration": nanoseconds(usage.decode_s),
    }
