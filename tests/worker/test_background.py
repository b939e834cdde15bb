"""What threads report of the loads that they run."""

import threading
import time

import pytest

from flashtensors.transfer.pipeline import LoadStats
from flashtensors.worker.background import PROGRESS_INTERVAL_S, BackgroundLoads
from flashtensors.worker.loading import Grant, OnReady, Progress
from flashtensors.worker.messages import LoadProgress

from .fake_models import FakeLoader, FakePlan

TOTAL = 1000


def reported(monkeypatch: pytest.MonkeyPatch, *reports: tuple[float, str, int]) -> list[LoadProgress]:
    """What is passed on of a load that reports phases and bytes at these times."""
    now_s = 0.0

    class Plan(FakePlan):
        def load(self, grant: Grant, progress: Progress, cancel: threading.Event, on_ready: OnReady) -> LoadStats:
            nonlocal now_s
            for now_s, phase, done_bytes in reports:  # noqa: B007 - the clock reads it
                progress(phase, done_bytes, TOTAL)
            return LoadStats(num_bytes=TOTAL, phase_seconds={}, reader="none")

    background = BackgroundLoads(FakeLoader(), wake=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now_s)
        background.start_load("m", Plan(FakeLoader(), "m"), Grant(kv_bytes=0))
        background.join()
    return [report for report in background.reports() if isinstance(report, LoadProgress)]


def test_progress_has_a_rate_once_there_are_two_reports_some_time_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = reported(monkeypatch, (5.0, "read", 0), (5.05, "read", 90), (6.0, "read", 400), (7.0, "read", 1000))
    assert [report.done_bytes for report in passed] == [0, 400, 1000]
    assert [report.bytes_per_s for report in passed] == [None, 400.0, 500.0]


def test_bytes_that_were_there_at_once_have_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = reported(monkeypatch, (5.0, "read", 1000))
    assert only.bytes_per_s is None
    passed = reported(monkeypatch, (5.0, "read", 800), (5.01, "copy", 900), (7.0, "copy", 1000))
    assert [report.bytes_per_s for report in passed] == [None, None, 100.0]


def test_a_load_that_waits_keeps_the_rate_that_it_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = reported(monkeypatch, (5.0, "read", 0), (6.0, "read", 1000), (16.0, "prepare", 1000))
    assert [report.bytes_per_s for report in passed] == [None, 1000.0, 1000.0]


def test_a_phase_reports_no_more_often_than_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [5.0 + PROGRESS_INTERVAL_S * 0.3 * index for index in range(10)]
    passed = reported(monkeypatch, *((at_s, "read", index) for index, at_s in enumerate(times)))
    assert [report.done_bytes for report in passed] == [0, 4, 8]
