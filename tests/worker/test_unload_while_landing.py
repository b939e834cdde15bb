"""An unload of a model that is ready, while its last bytes are still on their way."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flashtensors.errors import TransferError
from flashtensors.kernels import linear
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.transfer import paged_load
from flashtensors.transfer.block_reads import BlockReads
from flashtensors.transfer.copy_stream import HostCopyStream
from flashtensors.worker.checkpoint_loader import CheckpointLoader
from flashtensors.worker.host import Worker
from flashtensors.worker.messages import (
    Abort,
    Generate,
    LoadFailed,
    LoadModel,
    ModelLanded,
    ModelLoaded,
    ModelLoadFailed,
    ModelReady,
    ModelUnloaded,
    RequestFailed,
    UnloadModel,
)

from .fake_models import Bench, FakeImages, answer_to, load_command, register, request
from .harbours import make_harbour, make_loader


@pytest.fixture
def bench() -> Bench:
    """A model that is ready and never lands."""
    bench = Bench(images=FakeImages(150))
    bench.loader.landing_gates["a"] = threading.Event()
    bench.send(register("a"))
    return bench


def check_unloaded(bench: Bench) -> None:
    assert [(event.model, event.reason) for event in bench.wait_for(ModelUnloaded)] == [("a", "unload")]
    assert bench.of(ModelLanded) == bench.of(ModelLoadFailed) == []
    assert bench.loader.num_closed == 1


def test_its_load_is_cancelled_and_everybody_is_answered_once(bench: Bench) -> None:
    bench.send(load_command("a"), load_command("a"))
    bench.wait_for(ModelReady)
    bench.send(UnloadModel(model="a"))
    check_unloaded(bench)
    errors = [event.error for event in bench.of(LoadFailed)]
    assert [error.code for error in errors] == ["over_capacity"] * 2
    assert "was unloaded while it was loading" in errors[0].message
    assert bench.of(ModelLoaded) == []


def test_who_asks_meanwhile_gets_a_new_load(bench: Bench) -> None:
    bench.send(load_command("a"))
    bench.wait_for(ModelReady)
    bench.send(UnloadModel(model="a"), Generate(request=request("r", "a")), load_command("a"))
    bench.wait_finished("r")
    assert bench.tokens("r") == answer_to(request("r", "a"))
    check_unloaded(bench)
    assert bench.loader.num_loads == 2
    bench.loader.landing_gates["a"].set()
    assert len(bench.wait_for(ModelLoaded)) == 1


@pytest.mark.parametrize("is_aborted", [False, True])
def test_a_request_that_runs_ends_first(bench: Bench, is_aborted: bool) -> None:
    asked = request("r", "a", max_tokens=20)
    bench.send(Generate(request=asked))
    bench.run_until(lambda: bool(bench.tokens("r")))
    bench.send(UnloadModel(model="a"))
    time.sleep(0.05)  # a load that is cancelled ends within this
    if is_aborted:
        bench.send(Abort(request_id="r"))
    check_unloaded(bench)
    assert bench.finish_reasons("r") == ["abort" if is_aborted else "length"]
    assert is_aborted or bench.tokens("r") == answer_to(asked)


def test_a_load_that_fails_before_its_last_request_has_ended_is_a_failure(bench: Bench) -> None:
    bench.loader.landing_errors["a"] = TransferError("disk on fire")
    bench.send(Generate(request=request("r", "a", max_tokens=50)))
    bench.run_until(lambda: bool(bench.tokens("r")))
    bench.send(UnloadModel(model="a"))
    bench.wait_for_ring_after(bench.loader.landing_gates["a"].set)
    assert [event.reason for event in bench.wait_for(ModelUnloaded)] == ["unload"]
    assert [event.error.code for event in bench.of(ModelLoadFailed)] == ["transfer_failed"]
    assert [event.request_id for event in bench.of(RequestFailed)] == ["r"]


class DockedBench(Bench):
    """A worker that brings models to docks in host memory, and all that it says."""

    def __init__(self, loader: CheckpointLoader) -> None:
        self.events = []
        self._bell = threading.Semaphore(0)
        self.worker = Worker(
            loader.settings,
            emit=self.events.append,
            wake=self._bell.release,
            device=loader.device,
            loader=loader,
            images=loader.host_tier,
        )


class Disk:
    """Reads the first half of a model's blocks at once, and holds back the others, which it counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_held = self.num_held_read = 0
        self.may_go_on = threading.Event()
        read = BlockReads._read_slice

        def hold_back(reads: BlockReads, opened: Any, start: int, end: int) -> None:
            first_held = reads.num_blocks // 2
            self.num_held = reads.num_blocks - first_held
            if opened.index >= first_held:
                assert self.may_go_on.wait(30)
                self.num_held_read += 1
            read(reads, opened, start, end)

        monkeypatch.setattr(BlockReads, "_read_slice", hold_back)


@pytest.mark.skipif(sys.platform != "linux", reason="mapping memory at fixed addresses is Linux's")
def test_the_rest_is_not_read_and_all_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_can_pack", lambda dtype: False)  # a packed copy would not see what lands later
    monkeypatch.setattr(paged_load, "EARLY_S", 1e9)
    monkeypatch.setattr(HostCopyStream, "has_events", True)
    disk = Disk(monkeypatch)
    folder = write_tiny_checkpoint(tmp_path / "a", tiny_config("llama", num_hidden_layers=8, hidden_size=128))
    harbour = make_harbour(num_pages=12)  # five of them are the ring's, which every load passes through
    loader = make_loader(harbour, tmp_path)
    bench = DockedBench(loader)
    bench.send(LoadModel(model="a", folder=str(folder)))
    bench.wait_for(ModelReady)
    assert harbour.docks.pool.free_bytes < loader.device.budget_bytes
    bench.send(UnloadModel(model="a"))
    disk.may_go_on.set()
    assert [event.reason for event in bench.wait_for(ModelUnloaded)] == ["unload"]
    assert bench.of(ModelLanded) == bench.of(ModelLoadFailed) == []
    assert disk.num_held_read < disk.num_held
    assert harbour.docks.pool.free_bytes == loader.device.budget_bytes
    asked = request("r", "a")
    bench.send(Generate(request=asked))
    bench.wait_finished("r")
    bench.wait_for(ModelLanded)
    assert len(bench.tokens("r")) == asked.sampling.max_tokens
    bench.worker.close()
