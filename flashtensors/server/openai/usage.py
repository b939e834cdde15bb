"""Token counts in OpenAI's shape."""

from __future__ import annotations

from ..generation import Usage


def usage_body(usage: Usage) -> dict[str, object]:
    """`usage` of an answer or of a stream's last chunk."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }
