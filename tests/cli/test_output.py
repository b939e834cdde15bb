"""What progress looks like, on a terminal and off it."""

import io
import re
import sys

import pytest

from flashtensors.cli.output import ProgressDisplay, amount_text, rate_text


class Terminal(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, *updates: tuple[int, int, float | None]) -> str:
    """What the last frame shows of one bar."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressDisplay() as display:
        for done, total, bytes_per_s in updates:
            display.update("chat: read", done, total, bytes_per_s)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return next(line for line in reversed(re.split(r"[\r\n]+", text)) if line.strip())


def test_a_bar_shows_bytes_and_the_rate_that_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    last = drawn(monkeypatch, (0, 16_400_000_000, None), (4_100_000_000, 16_400_000_000, 3.1e9))
    assert last.startswith("chat: read")
    assert re.search(r"4\.1/16\.4 GB +3\.1 GB/s", last), last


def test_a_bar_that_is_told_no_rate_shows_none_before_it_has_seen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search(r"4\.1/16\.4 GB +\?", drawn(monkeypatch, (4_100_000_000, 16_400_000_000, None)))


def test_lines_off_a_terminal_say_bytes_and_rates_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as display:
        display.update("checking")
        display.update("chat: read", 0, 16_400_000_000)
        display.update("chat: read", 1, 16_400_000_000)  # too soon for another line
        display.update("chat: copy", 8_200_000_000, 16_400_000_000, 54.5e9)
        display.update("empty", 0, 0, None)
        display.update("done")
    lines = ["checking", "chat: read 0 B of 16.4 GB", "chat: copy 8.2 GB of 16.4 GB, 54.5 GB/s", "empty"]
    assert capsys.readouterr().err.splitlines() == lines


def test_rates_have_the_unit_that_suits_them() -> None:
    assert [rate_text(rate) for rate in (0.4, 93.14e6, 54.5e9)] == ["0 B/s", "93.1 MB/s", "54.5 GB/s"]
    assert amount_text(1_200_000_000, 16_400_000_000) == "1.2 GB of 16.4 GB"
