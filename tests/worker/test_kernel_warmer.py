"""Kernels of registered models are compiled by a process beside the worker, once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from flashtensors.errors import CheckpointError
from flashtensors.kernels.binaries import note_warmed
from flashtensors.runner.rehearsal import StepKinds
from flashtensors.step import RunnerLimits
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint
from flashtensors.worker.kernel_warmer import KernelWarmer
from flashtensors.worker.messages import Register
from flashtensors.worker.warm_process import WarmOrder

from ..runner.driver import LLAMA
from .harbours import make_harbour, make_loader, plan_model

LIMITS = RunnerLimits(num_blocks=9, block_size=16, max_slots=4, max_tokens_per_step=64, max_model_len=64)


def kinds_of(vocab_size: int) -> StepKinds:
    config = msgspec.structs.replace(LLAMA, vocab_size=vocab_size)
    return StepKinds.of(config, LIMITS, dtype="bfloat16", kv_dtype="bfloat16")


@pytest.fixture
def orders_of(tmp_path: Path) -> tuple[KernelWarmer, Callable[[], list[WarmOrder]]]:
    """A warmer whose processes write their orders down, and these orders."""
    code = (
        "import sys, pathlib, uuid; order = sys.stdin.buffer.read();"
        f"pathlib.Path({str(tmp_path)!r}, uuid.uuid4().hex + '.order').write_bytes(order); print('done')"
    )
    warmer = KernelWarmer(tmp_path / "folder", "cuda:3", command=(sys.executable, "-c", code))

    def orders() -> list[WarmOrder]:
        return [msgspec.json.decode(path.read_bytes(), type=WarmOrder) for path in tmp_path.glob("*.order")]

    return warmer, orders


def test_models_of_one_kind_are_compiled_once(orders_of: tuple[KernelWarmer, Callable[[], list[WarmOrder]]]) -> None:
    warmer, orders = orders_of
    for vocab_size in (50, 50, 60):
        warmer.want(lambda size=vocab_size: kinds_of(size))
        warmer.join()
    warmer.want(lambda: kinds_of(60))
    warmer.close()
    assert {(Path(order.root).name, order.device) for order in orders()} == {(Path(orders()[0].root).name, "cuda:3")}
    asked = [msgspec.json.decode(kinds, type=StepKinds) for order in orders() for kinds in order.kinds]
    assert sorted(kinds.config.vocab_size for kinds in asked) == [50, 60]


def test_what_another_process_compiled_starts_none(
    tmp_path: Path, orders_of: tuple[KernelWarmer, Callable[[], list[WarmOrder]]]
) -> None:
    warmer, orders = orders_of
    (tmp_path / "folder").mkdir()
    note_warmed(tmp_path / "folder", msgspec.json.encode(kinds_of(50)))
    warmer.want(lambda: kinds_of(50))
    warmer.join()
    assert orders() == []


def test_a_model_that_cannot_be_read_is_passed_over(
    orders_of: tuple[KernelWarmer, Callable[[], list[WarmOrder]]],
) -> None:
    warmer, orders = orders_of

    def fail() -> StepKinds:
        raise CheckpointError("no config.json")

    warmer.want(fail)
    warmer.want(lambda: kinds_of(50))
    warmer.close()
    warmer.want(lambda: kinds_of(70))
    assert sum(len(order.kinds) for order in orders()) <= 1


def test_closing_ends_a_process_that_runs(tmp_path: Path) -> None:
    code = f"import time, pathlib; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(600)"
    warmer = KernelWarmer(tmp_path, "cuda:0", command=(sys.executable, "-c", code))
    warmer.want(lambda: kinds_of(50))
    while not (tmp_path / "begun").exists():
        assert warmer._thread is not None  # pyright: ignore
    warmer.close()
    assert warmer._thread is None  # pyright: ignore


def test_no_process_is_no_error(tmp_path: Path) -> None:
    warmer = KernelWarmer(tmp_path, "cuda:0", command=(str(tmp_path / "nothing"),))
    warmer.want(lambda: kinds_of(50))
    warmer.close()


def test_a_registered_model_has_the_limits_that_it_will_be_loaded_with(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model", tiny_config("qwen3"), dtype="bfloat16")
    wanted: list[Callable[[], StepKinds]] = []

    class Warmer(KernelWarmer):
        def want(self, find_kinds: Callable[[], StepKinds]) -> None:
            wanted.append(find_kinds)

    harbour = dataclasses.replace(make_harbour(), warmer=Warmer(tmp_path, "cuda:0"))
    loader = make_loader(harbour, tmp_path)
    loader.expect(Register(model="m", folder=str(folder), max_model_len=48))
    planned = plan_model(loader, "m", folder, max_model_len=48)
    limits = planned.find_limits(harbour.docks.pool.num_handles * harbour.docks.pool.handle_bytes)
    (find_kinds,) = wanted
    kinds = find_kinds()
    assert kinds == StepKinds.of(planned.config, limits, dtype=planned.dtype, kv_dtype="bfloat16")
    assert kinds.limits.max_model_len == 48
    loader.close()
