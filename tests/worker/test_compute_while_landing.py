"""A prompt is computed layer by layer while its model is still on the link: the order of events, on a slow link."""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from flashtensors.errors import TransferError
from flashtensors.kernels import linear
from flashtensors.memory.arena import Arena
from flashtensors.models.layers import DecoderLayer
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer import paged_load
from flashtensors.transfer.block_reads import BlockReads
from flashtensors.transfer.blocks import Block
from flashtensors.transfer.copies import BlockCopier
from flashtensors.transfer.copy_stream import HostCopyStream
from flashtensors.worker import docked_load
from flashtensors.worker.docked_load import DockedPlan

from .harbours import Loading, generate, make_harbour, make_loader, plan_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mapping memory at fixed addresses is Linux's")

ALL = 10**9
NUM_LAYERS = 5
NUM_HELD = 2
"""Of them the last ones, which the link holds back."""
TIMEOUT_S = 30


class Link:
    """Carries out queued copies in order, in a thread; stands for a device's copy stream and for who queues copies.

    Args:
        events: Where it notes what it has copied.
        held_stage: Blocks from this stage on wait for `may_end`.
    """

    has_events = True

    def __init__(self, events: list[str], held_stage: int) -> None:
        self.may_end = threading.Event()
        self.has_waiter = threading.Event()
        """Somebody waits for what is held back."""
        self._is_holding = False
        self._events, self._held_stage = events, held_stage
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def make_copier(self, arena: Arena) -> Copier:
        arena.bytes_B.zero_()  # what a life before left there would do as well
        return Copier(self, BlockCopier(arena))

    def put(self, copier: BlockCopier, block: Block, page_B: Tensor) -> None:
        self._is_holding = self._is_holding or block.stage >= self._held_stage
        self._queue.put(lambda: self._copy(copier, block, page_B))

    def use(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> Landing:
        landing = Landing(self.has_waiter if self._is_holding else threading.Event())
        self._queue.put(landing.has_ended.set)
        return landing

    def synchronize(self) -> None:
        assert self.record().has_ended.wait(TIMEOUT_S)

    def _copy(self, copier: BlockCopier, block: Block, page_B: Tensor) -> None:
        if block.stage >= self._held_stage:
            assert self.may_end.wait(TIMEOUT_S)
        copier.copy(block, page_B)
        self._events.append(f"copied {block.stage}")

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()


class Copier:
    """Queues copies on a link."""

    def __init__(self, link: Link, copier: BlockCopier) -> None:
        self._link, self._copier = link, copier

    def copy(self, block: Block, page_B: Tensor, *, is_pinned: bool = False) -> int:
        self._link.put(self._copier, block, page_B)
        return 1

    def check(self) -> None:
        self._copier.check()


class Landing:
    """What a CUDA event is to who waits for it."""

    def __init__(self, has_waiter: threading.Event) -> None:
        self.has_ended = threading.Event()
        self._has_waiter = has_waiter

    def synchronize(self) -> None:
        self._has_waiter.set()
        assert self.has_ended.wait(TIMEOUT_S)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DockedPlan]:
    monkeypatch.setattr(linear, "_can_pack", lambda dtype: False)  # a packed copy would not see what lands later
    config = tiny_config("llama", num_hidden_layers=NUM_LAYERS, hidden_size=128)
    folder = write_tiny_checkpoint(tmp_path / "m", config)
    harbour = make_harbour(num_pages=80)
    yield plan_model(make_loader(harbour, tmp_path), "m", folder)
    harbour.close()


def note_layers(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> None:
    """Note when the first step has computed each layer."""
    compute, indexes = DecoderLayer.__call__, itertools.count()

    def compute_and_note(layer: DecoderLayer, *inputs: object) -> tuple[Tensor, Tensor]:
        outputs = compute(layer, *inputs)  # pyright: ignore
        events.append(f"computed {next(indexes)}")
        return outputs

    monkeypatch.setattr(DecoderLayer, "__call__", compute_and_note)


def test_first_layers_are_computed_while_the_last_are_on_the_link(
    planned: DockedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Loading(planned, host_bytes=ALL).run()
    expected = generate(first, max_tokens=1)
    first.close()
    assert planned.image.is_complete
    last_stages = planned.image.block_list.last_stages
    events: list[str] = []
    note_layers(monkeypatch, events)
    first_held = NUM_LAYERS - NUM_HELD
    link = Link(events, last_stages[first_held])
    monkeypatch.setattr(paged_load, "make_copy_stream", lambda device: link)
    monkeypatch.setattr(paged_load, "BlockCopier", link.make_copier)
    is_ready, token_ids = threading.Event(), []
    load = Loading(planned, host_bytes=ALL, on_ready=lambda loaded: is_ready.set())

    def answer() -> None:
        assert is_ready.wait(TIMEOUT_S)
        token_ids.extend(generate(load.ready[0], max_tokens=1))

    threads = [threading.Thread(target=load.run), threading.Thread(target=answer)]
    for thread in threads:
        thread.start()
    try:
        assert link.has_waiter.wait(TIMEOUT_S), f"nothing waits for the layers that are held back: {events}"
        computed = [event for event in events if event.startswith("computed")]
        assert computed == [f"computed {layer}" for layer in range(first_held)]
        assert f"copied {last_stages[first_held]}" not in events
        assert threads[0].is_alive()
        assert not token_ids
    finally:
        link.may_end.set()
        for thread in threads:
            thread.join()
        link.close()
        load.ready[0].close()
    assert token_ids == expected
    for layer in range(NUM_LAYERS):
        copies = {f"copied {stage}" for stage in range(last_stages[layer] + 1)}
        last_copy = max(index for index, event in enumerate(events) if event in copies)
        assert last_copy < events.index(f"computed {layer}"), f"layer {layer} was computed before it landed: {events}"


class HeldReads:
    """Holds back what is read of the last layers."""

    def __init__(self, planned: DockedPlan, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end = threading.Event()
        self.error: TransferError | None = None
        monkeypatch.setattr(paged_load, "EARLY_S", 1e9)
        monkeypatch.setattr(docked_load, "STEP_PATIENCE_S", TIMEOUT_S)
        monkeypatch.setattr(HostCopyStream, "has_events", True)
        read, last_stages = BlockReads._read_slice, planned.image.block_list.last_stages

        def hold_back(reads: BlockReads, opened: Any, start: int, end: int) -> None:
            if reads._blocks[opened.index].stage > last_stages[NUM_LAYERS - NUM_HELD - 1]:
                assert self.may_end.wait(TIMEOUT_S)
                if self.error is not None:
                    raise self.error
            read(reads, opened, start, end)

        monkeypatch.setattr(BlockReads, "_read_slice", hold_back)


def wait_for_computed(events: list[str], num_layers: int) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(events) < num_layers and time.monotonic() < deadline_s:
        time.sleep(0.01)
    time.sleep(0.05)  # were there more, they would come now
    assert events == [f"computed {layer}" for layer in range(num_layers)]


def test_first_layers_are_computed_while_the_last_are_read(
    planned: DockedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Loading(planned).run()
    expected = generate(first, max_tokens=1)
    first.close()
    events: list[str] = []
    note_layers(monkeypatch, events)
    held, token_ids = HeldReads(planned, monkeypatch), []
    is_ready = threading.Event()
    load = Loading(planned, on_ready=lambda loaded: is_ready.set())
    thread = threading.Thread(target=load.run)
    thread.start()
    assert is_ready.wait(TIMEOUT_S)
    answer = threading.Thread(target=lambda: token_ids.extend(generate(load.ready[0], max_tokens=1)))
    answer.start()
    try:
        wait_for_computed(events, NUM_LAYERS - NUM_HELD)
        assert thread.is_alive()
        assert not token_ids
    finally:
        held.may_end.set()
        thread.join()
        answer.join()
        load.ready[0].close()
    assert token_ids == expected


def test_a_prompt_whose_last_layers_cannot_be_read_fails_with_the_load(
    planned: DockedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    note_layers(monkeypatch, events)
    held = HeldReads(planned, monkeypatch)
    is_ready, errors = threading.Event(), []
    load = Loading(planned, on_ready=lambda loaded: is_ready.set())

    def run() -> None:
        with pytest.raises(TransferError, match="cannot be read"):
            load.run()
        errors.append("load")

    def answer() -> None:
        with pytest.raises(TransferError, match=r"was not loaded: .*cannot be read"):
            generate(load.ready[0], max_tokens=1)
        errors.append("answer")

    threads = [threading.Thread(target=run)]
    threads[0].start()
    assert is_ready.wait(TIMEOUT_S)
    threads.append(threading.Thread(target=answer))
    threads[1].start()
    wait_for_computed(events, NUM_LAYERS - NUM_HELD)
    held.error = TransferError("the file cannot be read")
    held.may_end.set()
    for thread in threads:
        thread.join()
    load.ready[0].close()
    assert sorted(errors) == ["answer", "load"]


@pytest.mark.parametrize("is_aborted", [False, True])
def test_a_step_that_waits_for_a_file_too_long_is_taken_again(
    is_aborted: bool, planned: DockedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Loading(planned).run()
    expected = generate(first)
    first.close()
    held, is_ready = HeldReads(planned, monkeypatch), threading.Event()
    monkeypatch.setattr(docked_load, "STEP_PATIENCE_S", 0.02)
    load = Loading(planned, on_ready=lambda loaded: is_ready.set())
    thread = threading.Thread(target=load.run)
    thread.start()
    assert is_ready.wait(TIMEOUT_S)
    engine = load.ready[0].engine
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add(EngineRequest(request_id="early", model="m", prompt_token_ids=[5, 9, 17, 3], sampling=sampling), ())
    for _ in range(3):
        assert engine.step() == []
        assert engine.has_work
    if is_aborted:
        engine.abort("early")
        assert [delta.finish_reason for delta in engine.step()] == ["abort"]
    held.may_end.set()
    thread.join()
    token_ids: dict[str, list[int]] = {"early": [], "late": []}
    engine.add(EngineRequest(request_id="late", model="m", prompt_token_ids=[5, 9, 17, 3], sampling=sampling), ())
    while engine.has_work:
        for delta in engine.step():
            token_ids[delta.request_id] += delta.token_ids
    load.ready[0].close()
    assert token_ids == {"early": [] if is_aborted else expected, "late": expected}


def test_what_is_read_after_a_model_was_prepared_counts_as_read(
    planned: DockedPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, is_ready = HeldReads(planned, monkeypatch), threading.Event()
    load = Loading(planned, on_ready=lambda loaded: is_ready.set())
    thread = threading.Thread(target=load.run)
    started_s = time.perf_counter()
    thread.start()
    assert is_ready.wait(TIMEOUT_S)
    time.sleep(0.3)
    held.may_end.set()
    thread.join()
    phases = load.stats.phase_seconds
    assert phases["read"] > 0.3 > phases["copy"]
    assert sum(phases.values()) - phases["plan"] <= time.perf_counter() - started_s
    load.ready[0].close()
