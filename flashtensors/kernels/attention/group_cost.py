"""When computing a shared prefix once pays: plain numbers, for whoever decides which sequences form a group.

A group costs launches and a merge, and saves reading the prefix again for each member but the first, mostly from the L2
cache. Measured by `benchmarks/kernels/bench_attention_groups.py` on one H200 with 256 own tokens: the smallest prefixes
that pay are 8k tokens for 4 members, 2k for 8, 1k for 16 to 64, 512 for 128 and more; 2 members do not pay by 8k.

That was with heads of 128 dims, 32 over 8. What a group costs by itself is time, and so a number of bytes. What it
costs a member is to add up sums, as many as its heads have dims: that grows with them as reading does, and so is a
number of tokens. (Sixteen times 256 answers over prefixes of 640 and 768 tokens, with half as many dims, were 1.28
times as quick with groups as without: `docs/throughput.md`.)
"""

from __future__ import annotations

GROUP_MIN_BYTES = 57_000_000
"""Bytes of keys and values of one layer that a group must spare its members at least."""

GROUP_MEMBER_TOKENS = 342
"""And as many tokens more for each member."""


def does_group_pay(num_members: int, prefix_tokens: int, token_bytes: int) -> bool:
    """Whether a step is quicker with a group than without.

    Args:
        num_members: Sequences that share the prefix.
        prefix_tokens: Tokens of it, less those of a group around this one.
        token_bytes: Keys and values of one token in one layer: 2 * kv heads * head dim * bytes of an element.
    """
    spared_tokens = (num_members - 1) * prefix_tokens - num_members * GROUP_MEMBER_TOKENS
    return spared_tokens * token_bytes >= GROUP_MIN_BYTES
