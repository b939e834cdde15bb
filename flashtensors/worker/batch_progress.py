"""How far a batch of prompts is, for people: finished prompts, tokens a second, KV cache in use, prefix hits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..request import RequestOutput
from .embedded import EmbeddedWorker

MIN_INTERVAL_S = 0.2
"""Least time between two looks at the worker's report."""


@contextlib.contextmanager
def show_progress(worker: EmbeddedWorker, title: str, total: int | None) -> Iterator[Callable[[RequestOutput], None]]:
    """Draw a bar on standard error; yields what to call with each output.

    Args:
        worker: Its reports say how full the KV cache is.
        title: What runs.
        total: Prompts in all; None: not known.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} tok/s  KV {task.fields[kv]:.0%}  prefix hits {task.fields[hits]:.0%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate=0.0, kv=0.0, hits=0.0)
        counts = BatchCounts(worker)
        last_s = 0.0

        def advance(output: RequestOutput) -> None:
            nonlocal last_s
            counts.add(output)
            bar.advance(task)
            now_s = time.monotonic()
            if now_s - last_s >= MIN_INTERVAL_S:
                last_s = now_s
                bar.update(task, rate=counts.tokens_per_s, kv=counts.kv_usage, hits=counts.prefix_hit_share)

        yield advance
        bar.update(task, rate=counts.tokens_per_s, kv=counts.kv_usage, hits=counts.prefix_hit_share)


class BatchCounts:
    """Sums over the outputs of one batch.

    Args:
        worker: That runs it.
    """

    def __init__(self, worker: EmbeddedWorker) -> None:
        self._worker = worker
        self._started_s = time.monotonic()
        self._num_tokens = self._num_prompt_tokens = self._num_cached_tokens = 0

    def add(self, output: RequestOutput) -> None:
        """Count a finished prompt."""
        self._num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        self._num_prompt_tokens += len(output.prompt_token_ids)
        self._num_cached_tokens += output.num_cached_tokens

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens of finished prompts over the time since the start."""
        return self._num_tokens / max(1e-9, time.monotonic() - self._started_s)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that running sequences take, as last reported."""
        stats = self._worker.stats
        return max((model.kv_usage for model in stats.models), default=0.0) if stats is not None else 0.0

    @property
    def prefix_hit_share(self) -> float:
        """Share of the finished prompts' tokens that were found in the prefix cache."""
        return self._num_cached_tokens / max(1, self._num_prompt_tokens)
