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

REDRAWS_PER_S = 2.0
"""How often a thread draws the bar, whether prompts end or not."""


@contextlib.contextmanager
def show_progress(
    worker: EmbeddedWorker, title: str, total: int | None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[OnDelta]:
    """Draw a bar on standard error; yields what to call with each request and the delta that it has taken in.

    Args:
        worker: Its reports say how full the KV cache is.
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


class _Figures(ProgressColumn):
    """The figures of a batch as they are when the bar is drawn."""

    def __init__(self, counts: BatchCounts) -> None:
        super().__init__(Column(no_wrap=True))
        self._counts = counts

    def render(self, task: Task) -> Text:
        counts = self._counts
        shares = f"KV {counts.kv_usage:.0%}  prefix hits {counts.prefix_hit_share:.0%}"
        return Text(f"{counts.tokens_per_s:,.0f} tok/s  {shares}")


class BatchCounts:
    """Sums over the requests of one batch, as their tokens come: at once for all of an answer that is not streamed.

    Args:
        worker: That runs it.
        clock: Seconds.
    """

    def __init__(self, worker: EmbeddedWorker, clock: Callable[[], float] = time.monotonic) -> None:
        self._worker, self._clock = worker, clock
        self._started_s = clock()
        self._num_tokens = self._num_prompt_tokens = self._num_cached_tokens = 0

    def add(self, builder: OutputBuilder, delta: SequenceDelta) -> None:
        """Count tokens of a request, and its prompt when it has ended."""
        self._num_tokens += len(delta.token_ids)
        if builder.is_finished:
            self._num_prompt_tokens += len(builder.request.prompt_token_ids)
            self._num_cached_tokens += builder.num_cached_tokens

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the time since the start."""
        return self._num_tokens / max(1e-9, self._clock() - self._started_s)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that running sequences take, as last reported."""
        stats = self._worker.stats
        return max((model.kv_usage for model in stats.models), default=0.0) if stats is not None else 0.0

    @property
    def prefix_hit_share(self) -> float:
        """Share of the finished prompts' tokens that were found in the prefix cache."""
        return self._num_cached_tokens / max(1, self._num_prompt_tokens)
