"""How far a batch of prompts is, for people: finished prompts, tokens a second, KV cache in use, prefix hits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ..request import SequenceDelta
from .embedded import EmbeddedWorker
from .outputs import OutputBuilder
from .prompt_window import OnDelta
from .stats import Stats

REDRAWS_PER_S = 2.0
"""How often a thread draws the bar, whether prompts end or not."""


@contextlib.contextmanager
def show_progress(
    worker: EmbeddedWorker, title: str, total: int | None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[OnDelta]:
    """Draw a bar on standard error; yields what to call with each request and the delta that it has taken in.

    Args:
        worker: Its reports say how many tokens it generates, and how full the KV cache is.
        title: What runs.
        total: Prompts in all; None: not known.
        clock: Seconds, for the rate.
    """
    counts = BatchCounts(worker, clock)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Figures(counts),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=REDRAWS_PER_S) as bar:
        task = bar.add_task(title, total=total)

        def advance(builder: OutputBuilder, delta: SequenceDelta) -> None:
            counts.add(builder, delta)
            if builder.is_finished:
                bar.advance(task)

        yield advance
        counts.is_complete = True


class _Figures(ProgressColumn):
    """The figures of a batch as they are when the bar is drawn."""

    def __init__(self, counts: BatchCounts) -> None:
        super().__init__(Column(no_wrap=True))
        self._counts = counts

    def render(self, task: Task) -> Text:
        counts = self._counts
        shares = f"KV {counts.kv_usage:.0%}  prefix hits {counts.prefix_hit_share:.0%}"
        return Text(f"{counts.tokens_per_s():,.0f} tok/s  {shares}")


class BatchCounts:
    """Sums over the answers of one batch, and what the worker reports while they run.

    Args:
        worker: That runs it.
        clock: Seconds.
    """

    def __init__(self, worker: EmbeddedWorker, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker, self._clock = worker, clock
        self._started_s = clock()
        self.is_complete = False
        """Whether all answers have come."""
        self._report_before = worker.stats
        self._first_report: Stats | None = None
        self._num_tokens = self._num_prompt_tokens = self._num_cached_tokens = 0

    def add(self, builder: OutputBuilder, delta: SequenceDelta) -> None:
        """Count tokens of a request, and its prompt when it has ended."""
        self._num_tokens += len(delta.token_ids)
        if builder.is_finished:
            self._num_prompt_tokens += len(builder.request.prompt_token_ids)
            self._num_cached_tokens += builder.num_cached_tokens

    def tokens_per_s(self) -> float:
        """What the worker generates, on average since it first reported after the start.

        Before its next report, and when all answers have come, it is tokens of answers over the time since the start.
        """
        latest = self._worker.stats
        if self._first_report is None and latest is not self._report_before:
            self._first_report = latest
        first = self._first_report
        if self.is_complete or first is None or latest is None or latest is first:
            return self._num_tokens / max(1e-9, self._clock() - self._started_s)
        return (_num_generated(latest) - _num_generated(first)) / max(1e-9, latest.at_s - first.at_s)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that running sequences take, as last reported."""
        stats = self._worker.stats
        return max((model.kv_usage for model in stats.models), default=0.0) if stats is not None else 0.0

    @property
    def prefix_hit_share(self) -> float:
        """Share of the finished prompts' tokens that were found in the prefix cache."""
        return self._num_cached_tokens / max(1, self._num_prompt_tokens)


def _num_generated(report: Stats) -> int:
    return sum(model.num_generated for model in report.models)
