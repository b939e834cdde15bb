"""Threads that share work: whoever waits for them hears of every failure, and nothing of them stays."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from flashtensors.errors import CapacityError, TransferError
from flashtensors.memory.host_mapping import HostMapping
from flashtensors.memory.host_pool import HostPool
from flashtensors.transfer.crew import Crew, ProgressTicker
from flashtensors.transfer.page_source import PageSource

TICKER = ProgressTicker(None, 0, lambda: 0)
CPU = torch.device("cpu")


class _Load:
    """Something that a failing thread has in its hands."""


def test_a_thread_that_fails_last_of_all_is_heard() -> None:
    may_fail = threading.Event()

    def work(crew: Crew) -> None:
        may_fail.wait(20)
        raise TransferError("the disk is on fire")

    def is_done() -> bool:
        """As if the thread had failed just before it is asked."""
        may_fail.set()
        while not crew.is_done:
            time.sleep(0.001)
        return True

    with pytest.raises(TransferError, match="on fire"), Crew(1, work, threading.Event()) as crew:
        crew.wait_for(is_done, TICKER)


def test_a_failure_keeps_nothing_alive() -> None:
    load = _Load()
    seen = weakref.ref(load)

    def work(crew: Crew, load: _Load) -> None:
        raise TransferError(f"{type(load).__name__} is on fire")

    def run(load: _Load) -> None:
        crew = Crew(2, lambda crew: work(crew, load), threading.Event())
        with crew:
            crew.wait_for(lambda: crew.is_done, TICKER)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(TransferError):
            run(load)
        del load
        assert seen() is None
    finally:
        gc.enable()


def test_a_system_without_threads_is_an_error_and_those_that_began_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    before = set(threading.enumerate())

    def start_two(thread: threading.Thread) -> None:
        if len(threading.enumerate()) >= len(before) + 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    def work(crew: Crew) -> None:
        while not crew.is_stopping:
            time.sleep(0.001)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(CapacityError, match="no more than 2 threads"), Crew(4, work, threading.Event()):
        raise AssertionError("the crew is not complete")
    assert set(threading.enumerate()) == before


def test_a_load_that_finds_no_page_says_so_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostPool(2 * (4096 + 4096), chunk_bytes=4096) as pool:
        pool.wait()
        taken = pool.allocate()
        assert taken is not None

        def refuse(mapping: HostMapping, offset: int, num_bytes: int) -> None:
            raise CapacityError("the system has no room")

        monkeypatch.setattr(HostMapping, "touch", refuse)
        before = set(threading.enumerate())
        with pytest.raises(CapacityError, match="no room"):
            PageSource(pool=pool, image=None, num_pages=3, ring_pages=3, chunk_bytes=4096, device=CPU)
        assert pool.free_bytes == pool.page_bytes
        assert set(threading.enumerate()) <= before
        pool.give_back(taken)
