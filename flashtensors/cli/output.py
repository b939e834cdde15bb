"""How commands print: data on standard output, progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click
import msgspec

if TYPE_CHECKING:
    from rich.progress import Progress, Task, TaskID
    from rich.text import Text

_LINE_EVERY_S = 5.0


def print_json(value: object) -> None:
    """One indented JSON document."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns of text under a head line."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size_text(num_bytes: int) -> str:
    """Bytes for people: `93.1 MB`."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def rate_text(bytes_per_s: float) -> str:
    """Bytes a second for people: `3.1 GB/s`."""
    return f"{size_text(round(bytes_per_s))}/s"


def amount_text(done: int, total: int, bytes_per_s: float | None = None) -> str:
    """How many bytes of how many, and how fast where that is known: `1.2 GB of 16.4 GB, 3.1 GB/s`."""
    amount = f"{size_text(done)} of {size_text(total)}"
    return amount if bytes_per_s is None else f"{amount}, {rate_text(bytes_per_s)}"


def note(text: str) -> None:
    """A remark on standard error."""
    click.echo(text, err=True)


class ProgressDisplay:
    """Bars on a terminal, a line now and then elsewhere; always on standard error.

    rich is imported when there is something to draw: it would double the start-up time of every command.
    """

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last_text = ""
        self._last_line_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(
        self, text: str, done: int | None = None, total: int | None = None, bytes_per_s: float | None = None
    ) -> None:
        """Show how far `text` is, in bytes where they are known; `done` is for the command itself to say.

        Args:
            text: What is done; each text has its own bar.
            done: Bytes so far.
            total: Bytes in all.
            bytes_per_s: What was reached so far; None: bars show what they see between updates.
        """
        if text == "done":
            return
        if sys.stderr.isatty():
            self._draw(text, done, total, bytes_per_s)
        elif text != self._last_text or time.monotonic() - self._last_line_s > _LINE_EVERY_S:
            self._last_text, self._last_line_s = text, time.monotonic()
            amount = f" {amount_text(done, total, bytes_per_s)}" if total and done is not None else ""
            note(f"{text}{amount}")

    def _draw(self, text: str, done: int | None, total: int | None, bytes_per_s: float | None) -> None:
        if self._bars is None:
            self._bars = _start_bars()
        if text not in self._tasks:
            self._tasks[text] = self._bars.add_task(text, total=total, bytes_per_s=None)
        self._bars.update(self._tasks[text], completed=done or 0, total=total, bytes_per_s=bytes_per_s)


def _start_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.text import Text

    class RateColumn(TransferSpeedColumn):
        """The rate that was told, else the one that rich finds between two updates."""

        def render(self, task: Task) -> Text:
            told = task.fields["bytes_per_s"]
            return super().render(task) if told is None else Text(rate_text(told), style="progress.data.speed")

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        RateColumn(),
        console=Console(stderr=True),
    )
    bars.start()
    return bars
