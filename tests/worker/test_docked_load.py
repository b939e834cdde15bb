"""Models that dock: what a life leaves behind and what it does not, images in the host tier, faults at every stage."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.errors import CapacityError, CheckpointError, ConfigError, DigestMismatch, FlashError, TransferError
from flashtensors.kernels import linear
from flashtensors.memory.host_driver import HostMemoryDriver
from flashtensors.memory.host_mapping import create_memory_file
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.worker.harbour import Harbour
from flashtensors.worker.host_index import INDEX_BYTES
from flashtensors.worker.host_tier import HostTier

from .harbours import HANDLE_BYTES, PAGE_BYTES, RING_PAGES, Loading, generate, make_harbour, make_loader, plan_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mapping memory at fixed addresses is Linux's")

ALL = 10**9


@pytest.fixture(autouse=True)
def plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing packs weights; a packed copy would not see those of the next model."""
    monkeypatch.setattr(linear, "_can_pack", lambda dtype: False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fine-tunes a, b and c of one architecture with their own end tokens, and another architecture."""
    base = tmp_path_factory.mktemp("models")
    configs = {name: tiny_config("llama", eos_token_id=2 + index) for index, name in enumerate("abc")}
    configs["other"] = tiny_config("qwen3")
    return {
        name: write_tiny_checkpoint(base / name, config, seed=index, num_shards=2)
        for index, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Greedy tokens of each model in a harbour of its own."""
    answers: dict[str, list[int]] = {}
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_can_pack", lambda dtype: False)
        for name, folder in folders.items():
            harbour = make_harbour()
            loaded = Loading(plan_model(make_loader(harbour, store), name, folder)).run()
            answers[name] = generate(loaded)
            loaded.close()
            harbour.close()
    assert len({tuple(answer) for answer in answers.values()}) == len(answers), "models that differ answer alike"
    return answers


@pytest.fixture
def harbour() -> Iterator[Harbour]:
    harbour = make_harbour()
    yield harbour
    harbour.close()


def free_handles(harbour: Harbour) -> int:
    return harbour.docks.pool.free_bytes // HANDLE_BYTES


def loading(harbour: Harbour, tmp_path: Path, folders: dict[str, Path], name: str, **options: object) -> Loading:
    return Loading(plan_model(make_loader(harbour, tmp_path), name, folders[name]), **options)  # pyright: ignore


# Docks.


def test_fine_tunes_take_turns_at_one_runner(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    runners = []
    for name in "abcab":
        load = loading(harbour, tmp_path, folders, name, host_bytes=ALL)
        loaded = load.run()
        assert generate(loaded) == expected[name]
        assert loaded.eos_token_ids == (2 + "abc".index(name),)
        runners.append(loaded.engine._runner._runner)  # pyright: ignore
        loaded.close()
    assert len({id(runner) for runner in runners}) == 1
    assert harbour.docks.num_unused == 1
    assert free_handles(harbour) == 64


def test_two_models_of_a_signature_have_two_docks(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    loaded = {name: loading(harbour, tmp_path, folders, name).run() for name in ("a", "other", "b")}
    for name, model in loaded.items():
        assert generate(model) == expected[name]
        assert model.num_bytes == model.weight_bytes + model.kv_cache_bytes
    held_handles = sum(model.num_bytes for model in loaded.values()) // HANDLE_BYTES
    assert free_handles(harbour) == 64 - held_handles
    for model in loaded.values():
        model.close()
    assert (harbour.docks.num_unused, free_handles(harbour)) == (3, 64)


def test_a_demand_is_what_a_load_takes(harbour: Harbour, tmp_path: Path, folders: dict[str, Path]) -> None:
    load = loading(harbour, tmp_path, folders, "a")
    demand = load.planned.demand
    loaded = load.run()
    assert (loaded.weight_bytes, loaded.kv_cache_bytes) == (demand.fixed_bytes, demand.min_flexible_bytes)
    assert demand.step_bytes == HANDLE_BYTES
    assert loaded.limits.max_model_len == 512
    assert loaded.limits.num_blocks * 16 >= 512
    loaded.close()


def test_caches_of_another_dtype_are_no_match_for_a_dock(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8', but on a CPU"):
        plan_model(make_loader(harbour, tmp_path, kv_cache_dtype="fp8"), "a", folders["a"])
    planned = plan_model(make_loader(harbour, tmp_path), "a", folders["a"])
    assert planned.key != replace(planned.key, kv_cache_dtype="fp8")


def test_a_kept_cache_does_not_hold_the_runner_of_a_dock_that_went(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path]
) -> None:
    loaded = loading(harbour, tmp_path, folders, "a").run()
    runner = weakref.ref(loaded.engine._runner._runner)  # pyright: ignore
    kept = loaded.close(keeps_kv=True)
    assert kept is not None
    assert runner() is not None
    del loaded
    harbour.docks.close()
    gc.collect()
    assert runner() is None
    kept.close()


def test_a_dock_without_addresses_was_not_taken() -> None:
    class Refusing(HostMemoryDriver):
        def reserve(self, num_bytes: int) -> int:
            raise TransferError("no addresses")

    harbour = make_harbour(driver=Refusing())
    with pytest.raises(TransferError, match="no addresses"):
        harbour.docks.take("key", HANDLE_BYTES)
    harbour.close()


def test_docks_of_other_signatures_go_when_there_are_too_many(tmp_path: Path) -> None:
    harbour = make_harbour()
    for hidden in range(1, 12):
        config = tiny_config("llama", intermediate_size=32 * hidden)
        folder = write_tiny_checkpoint(tmp_path / str(hidden), config)
        Loading(plan_model(make_loader(harbour, tmp_path), str(hidden), folder)).run().close()
    assert harbour.docks.num_unused == 8
    harbour.close()


def test_a_model_that_leaves_in_the_middle_of_its_work_takes_its_dock_along(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    loaded = loading(harbour, tmp_path, folders, "a").run()
    request = EngineRequest(request_id="x", model="a", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=9))
    loaded.engine.add(request, ())
    loaded.engine.step()
    assert loaded.close(keeps_kv=True) is None
    assert (harbour.docks.num_unused, free_handles(harbour)) == (0, 64)
    again = loading(harbour, tmp_path, folders, "a").run()
    assert generate(again) == expected["a"]
    again.close()


# Kept KV caches.


def test_a_kept_cache_knows_its_prefixes_at_another_dock(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    prompt = list(range(3, 103))
    first = loading(harbour, tmp_path, folders, "a").run()
    answer = generate(first, prompt=prompt)
    num_bytes = first.kv_cache_bytes
    kept = first.close(keeps_kv=True)
    assert kept is not None
    assert kept.num_bytes == num_bytes
    assert free_handles(harbour) == 64 - num_bytes // HANDLE_BYTES
    sibling = loading(harbour, tmp_path, folders, "b").run()  # at the dock where a was
    assert generate(sibling) == expected["b"]
    second = loading(harbour, tmp_path, folders, "a", kept=kept).run()
    assert second.engine is first.engine
    hits = second.engine.stats().prefix_hits
    assert generate(second, prompt=prompt) == answer
    assert second.engine.stats().prefix_hits >= hits + 96
    assert generate(sibling) == expected["b"]
    kept.close()  # it is the model's now
    assert generate(second, prompt=prompt) == answer
    second.close()
    sibling.close()
    assert free_handles(harbour) == 64


def test_a_kept_cache_that_is_not_wanted_gives_its_memory_back(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path]
) -> None:
    kept = loading(harbour, tmp_path, folders, "a").run().close(keeps_kv=True)
    assert kept is not None
    kept.close()
    kept.close()
    assert free_handles(harbour) == 64


# The host tier.


def test_a_complete_image_needs_no_file(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading(harbour, tmp_path, folders, "a", host_bytes=ALL)
    load.run().close()
    assert load.stats.host_tier_bytes == 0
    assert harbour.tier.held_bytes("a") == load.planned.host_bytes
    assert list(harbour.tier.names()) == ["a"]

    def forbid(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a file was asked for: {arguments}")

    for name in ("open", "stat", "fstat", "preadv"):
        monkeypatch.setattr(os, name, forbid)
    again = Loading(load.planned, host_bytes=ALL)
    loaded = again.run()
    monkeypatch.undo()
    assert again.stats.host_tier_bytes == again.stats.num_bytes
    assert set(again.stats.phase_seconds) == {"plan", "map", "read", "prepare", "copy"}
    loaded.close()


@pytest.mark.parametrize("num_pages", [0, 1, 3, 100])
def test_an_image_keeps_the_first_layers_that_its_grant_holds(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]], num_pages: int
) -> None:
    load = loading(harbour, tmp_path, folders, "a", host_bytes=num_pages * PAGE_BYTES + 5)
    load.run().close()
    full_bytes = load.planned.host_bytes
    assert harbour.tier.held_bytes("a") == min(full_bytes, num_pages * PAGE_BYTES)
    assert sorted(load.planned.image.page_indexes) == list(range(harbour.tier.held_bytes("a") // PAGE_BYTES))
    assert harbour.tier.pool is not None
    assert harbour.tier.pool.free_bytes == harbour.tier.pool.num_bytes - harbour.tier.held_bytes("a"), "a ring leaked"
    again = Loading(load.planned, host_bytes=ALL)
    loaded = again.run()
    assert generate(loaded) == expected["a"]
    assert (again.stats.host_tier_bytes > 0) == (num_pages > 0)
    assert harbour.tier.held_bytes("a") == full_bytes
    loaded.close()


def test_a_tier_that_is_full_leaves_pages_to_read_to(
    tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    harbour = make_harbour(num_pages=RING_PAGES + 2)
    assert harbour.tier.capacity_bytes == 2 * PAGE_BYTES
    for name in ("a", "b", "c"):
        loaded = loading(harbour, tmp_path, folders, name, host_bytes=PAGE_BYTES if name != "c" else 0).run()
        assert generate(loaded) == expected[name]
        loaded.close()
    assert {name: harbour.tier.held_bytes(name) for name in harbour.tier.names()} == {"a": PAGE_BYTES, "b": PAGE_BYTES}
    harbour.close()


def test_tails_are_trimmed_and_images_dropped(harbour: Harbour, tmp_path: Path, folders: dict[str, Path]) -> None:
    load = loading(harbour, tmp_path, folders, "a")
    stats = load.planned.fill(ALL, lambda *progress: None, threading.Event())
    assert stats.num_bytes > 0
    assert harbour.tier.held_bytes("a") == load.planned.host_bytes
    assert harbour.tier.trim("a", 2 * PAGE_BYTES + 7) == 2 * PAGE_BYTES
    assert sorted(load.planned.image.page_indexes) == [0, 1]
    assert harbour.tier.trim("a", 5 * PAGE_BYTES) == 2 * PAGE_BYTES
    harbour.tier.drop("a")
    harbour.tier.drop("unknown")
    assert (harbour.tier.held_bytes("a"), list(harbour.tier.names())) == (0, [])


def test_a_worker_that_starts_again_finds_its_images(
    tmp_path: Path, folders: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    fd = create_memory_file(40 * PAGE_BYTES + INDEX_BYTES)
    first = make_harbour(fd=fd)
    for name in "ab":
        loading(first, tmp_path, folders, name, host_bytes=ALL if name == "a" else 3 * PAGE_BYTES).run().close()
    held = {name: first.tier.held_bytes(name) for name in "ab"}
    # No close: the process that had it is gone.
    second = make_harbour(fd=fd)
    assert {name: second.tier.held_bytes(name) for name in second.tier.names()} == held
    assert second.tier.pool is not None
    assert second.tier.pool.free_bytes == second.tier.pool.num_bytes - sum(held.values())
    load = loading(second, tmp_path, folders, "a")
    loaded = load.run()
    assert load.stats.host_tier_bytes == load.stats.num_bytes
    assert generate(loaded) == expected["a"]
    loaded.close()
    assert second.tier.trim("b", PAGE_BYTES) == 0
    third = make_harbour(fd=fd)
    assert {name: third.tier.held_bytes(name) for name in third.tier.names()} == {"a": held["a"]}
    changed = loading(third, tmp_path, {"a": folders["c"]}, "a")  # other files under the same name
    assert third.tier.held_bytes("a") == 0
    loaded = changed.run()
    assert generate(loaded) == expected["c"]
    loaded.close()
    for harbour in (first, second, third):
        harbour.close()
    os.close(fd)


# Faults.


def fail_at(kind: type[FlashError]) -> FlashError:
    return kind("this is where it fails")


def refuse(*arguments: object, **options: object) -> None:
    raise fail_at(CapacityError)


@pytest.mark.parametrize("stage", ["weights", "kv", "runner", "limits"])
def test_a_load_that_fails_gives_back_all_that_it_took(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    served = loading(harbour, tmp_path, folders, "b").run()
    free = free_handles(harbour)
    with monkeypatch.context() as patch:
        if stage in ("runner", "limits"):
            name = {"runner": "make_runner", "limits": "choose_limits"}[stage]
            patch.setattr(f"flashtensors.worker.docked_load.{name}", refuse)
        else:
            num_maps = {"weights": 0, "kv": 1}[stage]
            real = HostMemoryDriver.map

            def faulty(self: HostMemoryDriver, address: int, handles: list[int], handle_bytes: int) -> None:
                nonlocal num_maps
                if num_maps == 0:
                    raise fail_at(CapacityError)
                num_maps -= 1
                real(self, address, handles, handle_bytes)

            patch.setattr(HostMemoryDriver, "map", faulty)
        failing = loading(harbour, tmp_path, folders, "other", host_bytes=ALL)
        with pytest.raises(CapacityError, match="where it fails"):
            failing.run()
    assert failing.ready == []
    assert free_handles(harbour) == free
    assert (harbour.docks.num_unused, harbour.docks._num_taken) == (0, 1)  # pyright: ignore
    assert generate(served)
    loaded = loading(harbour, tmp_path, folders, "other").run()
    loaded.close()
    served.close()


def test_a_load_that_is_cancelled_gives_back_all_that_it_took(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path]
) -> None:
    load = loading(harbour, tmp_path, folders, "a", host_bytes=ALL)
    load.cancel.set()
    with pytest.raises(TransferError, match="cancelled"):
        load.run()
    assert free_handles(harbour) == 64
    assert harbour.tier.pool is not None
    assert harbour.tier.pool.free_bytes == harbour.tier.pool.num_bytes - harbour.tier.held_bytes("a")
    load.cancel.clear()
    load.run().close()


def test_a_load_from_the_host_tier_can_be_cancelled_too(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path]
) -> None:
    load = loading(harbour, tmp_path, folders, "a", host_bytes=ALL)
    load.run().close()
    again = Loading(load.planned, host_bytes=ALL)
    again.cancel.set()
    with pytest.raises(TransferError, match="cancelled"):
        again.run()
    assert (again.ready, free_handles(harbour)) == ([], 64)


def test_a_failed_load_closes_the_cache_that_it_was_given(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path]
) -> None:
    kept = loading(harbour, tmp_path, folders, "a").run().close(keeps_kv=True)
    load = loading(harbour, tmp_path, folders, "a", kept=kept)
    load.cancel.set()
    with pytest.raises(TransferError):
        load.run()
    assert free_handles(harbour) == 64


def test_a_device_that_fails_after_ready_leaves_the_model_to_its_owner(
    harbour: Harbour, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading(harbour, tmp_path, folders, "a")

    def fail(copier: object) -> None:
        raise fail_at(TransferError)

    monkeypatch.setattr("flashtensors.transfer.copies.BlockCopier.check", fail)
    with pytest.raises(TransferError, match="where it fails"):
        load.run()
    (loaded,) = load.ready
    with pytest.raises(FlashError, match="where it fails"):
        generate(loaded)
    loaded.close()
    assert free_handles(harbour) == 64
    assert harbour.docks.num_unused == 0


def test_a_file_that_was_replaced_is_not_loaded(harbour: Harbour, tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "mine", tiny_config("llama"))
    load = Loading(plan_model(make_loader(harbour, tmp_path), "mine", folder))
    os.utime(next(folder.glob("*.safetensors")), ns=(1, 1))
    with pytest.raises(CheckpointError, match="was replaced"):
        load.run()
    assert free_handles(harbour) == 64


def test_a_thousand_swaps_take_no_more_memory(harbour: Harbour, tmp_path: Path, folders: dict[str, Path]) -> None:
    planned = {name: plan_model(make_loader(harbour, tmp_path), name, folders[name]) for name in ("a", "other")}
    created: list[int] = []
    for index in range(1000):
        loaded = Loading(planned["a" if index % 2 else "other"], host_bytes=ALL).run()
        loaded.close()
        if index in (10, 999):
            gc.collect()
            created.append(len(os.listdir("/proc/self/fd")) + threading.active_count())
    assert created[0] == created[1]
    assert free_handles(harbour) == 64


# Digests.


def test_other_bytes_than_the_first_time_are_not_served(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "tiny", tiny_config("llama"))
    write_tiny_tokenizer(source)
    catalog = Catalog(tmp_path / "store")
    record = pull(catalog, str(source))
    path = next(record.path.glob("*.safetensors"))
    state = path.stat()
    page_bytes = 16 * 1024**2 + 4096

    def load_once(*, is_verified: bool = True) -> Loading:
        harbour = make_harbour()
        harbour.tier.close()
        tier = HostTier.open(2 * page_bytes, chunk_bytes=16 * 1024**2, ring_pages=2, pinning=None, num_threads=1)
        harbour = Harbour(device=torch.device("cpu"), docks=harbour.docks, tier=tier, workspace=None, num_threads=2)
        loader = make_loader(harbour, tmp_path / "store", verify_digests=is_verified)
        load = Loading(plan_model(loader, record.name, record.path))
        try:
            load.run().close()
        finally:
            assert free_handles(harbour) == 64
            harbour.close()
        return load

    assert load_once().stats.num_checked == 1, "the pull has recorded what it hashed"
    with open(path, "r+b") as file:
        file.seek(-7, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-7, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # the disk decayed: nobody wrote
    with pytest.raises(DigestMismatch, match=rf"{path.name}: chunk 0 .*flash pull --force"):
        load_once()
    assert load_once(is_verified=False).stats.num_checked == 0
    os.utime(path)
    assert load_once().stats.num_checked == 0, "a file that was written again has new digests"
    digests = catalog.digests_path(record)
    assert digests.exists()
    catalog.remove(record.name)
    assert not digests.exists()
