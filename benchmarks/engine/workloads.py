"""Deterministic lists of requests that peers were measured with, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

Workload = list[tuple[list[int], int]]
"""Prompt, and how many tokens to generate."""


def bench256() -> Workload:
    """256 unrelated requests, prompts and answers of 100 to 1,024 tokens."""
    source = random.Random(0)
    requests = []
    for _ in range(256):
        prompt = [source.randint(2, 10_000) for _ in range(source.randint(100, 1024))]
        requests.append((prompt, source.randint(100, 1024)))
    return requests


def monkeys() -> Workload:
    """Repeated sampling: 640 tokens that all share, 128 for each of 16 problems, 256 answers to each."""
    source = random.Random(0)
    shared = [source.randint(2, 10_000) for _ in range(640)]
    requests = []
    for _ in range(16):
        prompt = shared + [source.randint(2, 10_000) for _ in range(128)]
        requests += [(prompt, source.randint(64, 256)) for _ in range(256)]
    return requests


def sharegpt() -> Workload:
    """2,000 chats of log-normal lengths (medians 134 in, 122 out) that share nothing."""
    source = random.Random(0)
    requests = []
    for _ in range(2000):
        num_tokens = max(4, min(2048, int(source.lognormvariate(4.9, 1.2))))
        prompt = [source.randint(2, 10_000) for _ in range(num_tokens)]
        requests.append((prompt, max(4, min(1024, int(source.lognormvariate(4.8, 1.0))))))
    return requests


WORKLOADS: Mapping[str, Callable[[], Workload]] = {"bench256": bench256, "monkeys": monkeys, "sharegpt": sharegpt}
