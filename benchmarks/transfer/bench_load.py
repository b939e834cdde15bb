"""How fast do weights reach the device from host tier, page cache and cold disk, against what the machine can?

Every row is held against a limit measured in the same run without the package's code, and against other libraries on
the same files, each in a process of its own (`load_once.py`). Loads are checked against the bytes on disk before they
are timed. A rate is bytes of the checkpoint over the whole time of the call, in units of 10^9 bytes per second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread

from flashtensors.checkpoint.architecture import read_model_config
from flashtensors.checkpoint.chunk_digests import DigestCheck
from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.memory.arena import Arena
from flashtensors.memory.host_pool import HostPool
from flashtensors.memory.pinning import find_pinning
from flashtensors.models.registry import weight_layout
from flashtensors.transfer.host_image import HostImage
from flashtensors.transfer.load_plan import LoadPlan, make_copy_plan, make_load_plan
from flashtensors.transfer.pipeline import LoadStats, fill_image, load
from flashtensors.transfer.probe import FileSystemProbe
from flashtensors.transfer.readers.automatic import AutomaticReader

from checkpoints import write_model, write_small_tensors  # isort: skip
from machine_limits import (  # isort: skip
    MIB,
    direct_read_rate,
    drop_page_cache,
    fill_page_cache,
    memcpy_rate,
    pinned_copy_rate,
)

GIB = 1024**3
RAW_SETTINGS = [(8, 1), (16, 1), (16, 4), (32, 4), (16, 16)]
"""Threads and MiB of one read, for the raw rate of the disk."""

PEERS = ["safetensors", "fastsafetensors", "run:ai streamer", "InstantTensor"]


class Bench:
    """The rows of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.rows: list[dict[str, Any]] = []
        self.open_reader = partial(AutomaticReader, probe=FileSystemProbe())

    def row(self, shape: str, case: str, rates: list[float], **facts: Any) -> None:
        """Add a row and print it."""
        self.rows.append({"shape": shape, "case": case, "gigabytes_per_second": spread(rates), **facts})
        print(json.dumps(self.rows[-1]), flush=True)

    def timed(self, plan: LoadPlan, arena: Arena, **options: Any) -> tuple[float, LoadStats]:
        """GB/s of one load, clock around the whole call."""
        started = time.perf_counter()
        stats = load(
            plan,
            arena,
            num_threads=self.args.threads,
            chunk_size=self.args.chunk_mib * MIB,
            open_reader=self.open_reader,
            **options,
        )
        return plan.file_bytes / (time.perf_counter() - started) / 1e9, stats

    def library_rates(self, library: str, folders: dict[str, Path], num_loads: int) -> list[list[float]]:
        """GB/s of each load of each folder, imports and context not counted; empty where the library is not there."""
        script = str(Path(__file__).parent / "load_once.py")
        command = [sys.executable, script, library, str(self.device), str(num_loads), *map(str, folders.values())]
        places = [str(Path(__file__).parents[2]), *([str(self.args.peers)] if self.args.peers else [])]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
        ended = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300, check=False)
        if ended.returncode != 0:
            print(f"{library}: {ended.stderr[-800:]}", flush=True)
            return []
        return json.loads(ended.stdout.strip().splitlines()[-1])

    def library_rows(
        self, state: str, folders: dict[str, Path], prepare: Callable[[], None], *, num_loads: int, num_rounds: int
    ) -> None:
        """Rows for every library's first load, and for those after it; `prepare` makes the files cold or warm.

        In every round each library has its turn, as what a disk gives changes from minute to minute.
        """
        first: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        later: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(num_rounds):
            for library in ["flashtensors", "flashtensors, no pool", *self.args.libraries]:
                prepare()
                for shape, rates in zip(folders, self.library_rates(library, folders, num_loads), strict=False):
                    first[shape, library] += rates[:1]
                    later[shape, library] += rates[1:]
        for (shape, library), rates in first.items():
            self.row(shape, f"{state}, first load of a process: {library}", rates)
            if later[shape, library]:
                self.row(shape, f"{state}, later loads of a process: {library}", later[shape, library])

    def new_pool(self, num_bytes: int) -> HostPool:
        """A pool of pages of the benchmark's chunk size."""
        return HostPool(
            num_bytes,
            chunk_bytes=self.args.chunk_mib * MIB,
            pinning=find_pinning(self.device),
            num_threads=self.args.threads,
        )


def check_bytes(plan: LoadPlan, arena: Arena, every: int) -> None:
    """Raise unless the arena holds the bytes of the files."""
    for extent in plan.extents[::every]:
        with open(extent.path, "rb") as file:
            file.seek(extent.file_offset)
            expected = torch.frombuffer(bytearray(file.read(extent.num_bytes)), dtype=torch.uint8)
        found = arena.bytes_B[extent.arena_offset : extent.arena_offset + extent.num_bytes].cpu()
        if not torch.equal(found, expected):
            raise SystemExit(f"{extent.name} was loaded wrong")


def measure_limits(bench: Bench) -> None:
    if bench.device.type == "cuda":
        bench.row("", "limit: pinned copy", [pinned_copy_rate(bench.device)])
    bench.row("", "limit: memcpy", [memcpy_rate(bench.args.threads)])


def measure_host_tier(bench: Bench, shape: str, plan: LoadPlan, arena: Arena) -> None:
    with bench.new_pool(plan.file_bytes + GIB) as pool, HostImage(plan, pool) as image:
        pool.wait()
        fill_image(image, num_threads=bench.args.threads)
        load(plan, arena, image=image)
        check_bytes(plan, arena, every=max(1, len(plan.extents) // 40))
        rates = [bench.timed(plan, arena, image=image)[0] for _ in range(5)]
        _, stats = bench.timed(plan, arena, image=image)
        bench.row(shape, "host tier", rates, is_complete=image.is_complete, phase_seconds=stats.phase_seconds)


def measure_page_cache(bench: Bench, shape: str, plan: LoadPlan, arena: Arena) -> None:
    paths = list(plan.files)
    fill_page_cache(paths)
    with bench.new_pool(2 * GIB) as pool:
        pool.wait()
        bench.timed(plan, arena, pool=pool)
        check_bytes(plan, arena, every=max(1, len(plan.extents) // 40))
        timed = [bench.timed(plan, arena, pool=pool) for _ in range(5)]
        stats = timed[-1][1]
        rates = [rate for rate, _ in timed]
        bench.row(shape, "page cache", rates, reader=stats.reader, phase_seconds=stats.phase_seconds)
        check = DigestCheck({path: path.stat().st_size for path in paths})
        load(plan, arena, pool=pool, check=check)
        rates = [bench.timed(plan, arena, pool=pool, check=check)[0] for _ in range(3)]
        bench.row(shape, "page cache, digests checked", rates, num_checked=check.num_checked)
    timed = [bench.timed(plan, arena) for _ in range(3)]
    rates = [rate for rate, _ in timed]
    bench.row(shape, "page cache, no pool", rates, phase_seconds=timed[-1][1].phase_seconds)


def measure_disk(bench: Bench, shape: str, plan: LoadPlan, arena: Arena) -> None:
    paths = list(plan.files)
    check = DigestCheck({path: path.stat().st_size for path in paths})
    raw: list[float] = []
    plain: list[float] = []
    checked: list[float] = []
    stats: LoadStats | None = None
    with bench.new_pool(2 * GIB) as pool:
        pool.wait()
        load(plan, arena, pool=pool, check=check)  # records the digests
        for _ in range(bench.args.cold_runs):
            for num_threads, block_mib in RAW_SETTINGS:
                drop_page_cache(paths)
                rate = direct_read_rate(paths, num_threads, block_mib * MIB, 3 * GIB)
                raw.append(rate)
                print(f"raw {num_threads} x {block_mib} MiB: {rate:.2f}", flush=True)
            drop_page_cache(paths)
            rate, stats = bench.timed(plan, arena, pool=pool)
            plain.append(rate)
            drop_page_cache(paths)
            checked.append(bench.timed(plan, arena, pool=pool, check=check)[0])
    bench.row(shape, "limit: O_DIRECT reads", raw)
    bench.row(shape, "disk", plain, reader=stats.reader if stats else "")
    bench.row(shape, "disk, digests checked", checked, num_checked=check.num_checked)


def measure_pool(bench: Bench, shape: str, plan: LoadPlan, arena: Arena) -> None:
    """Pools that are made alone, and one that is made while a model is loaded through its first pages."""
    num_bytes = int(bench.args.pool_gib * GIB)
    first: list[float] = []

    def ready_rate(during: Callable[[HostPool], object]) -> float:
        started = time.perf_counter()
        with bench.new_pool(num_bytes) as pool:
            pool.wait(1)
            first.append(time.perf_counter() - started)
            during(pool)
            pool.wait()
            ready_s = time.perf_counter() - started
            problem = pool.pinning_problem
            closing = time.perf_counter()
        print(f"pool: {ready_s:.2f} s to make, {time.perf_counter() - closing:.2f} s to close, {problem}", flush=True)
        return num_bytes / ready_s / 1e9

    # A virtual machine gets much of its memory when it first touches it; a second pool is made of what it has.
    bench.row("", "host pool ready, first time", [ready_rate(lambda pool: None)])
    bench.row("", "host pool ready", [ready_rate(lambda pool: None) for _ in range(bench.args.pool_runs)])
    fill_page_cache(list(plan.files))
    rates: list[float] = []
    beside = [
        ready_rate(lambda pool: rates.append(bench.timed(plan, arena, pool=pool)[0]))
        for _ in range(bench.args.pool_runs)
    ]
    bench.row(shape, "page cache, while a pool is made", rates)
    bench.row("", "host pool ready, beside a load", beside)
    bench.rows.append({"case": "host pool, first segment", "seconds": spread(first)})
    print(bench.rows[-1], flush=True)


def measure_shape(bench: Bench, shape: str, folder: Path) -> None:
    if shape == "small-tensors":
        write_small_tensors(folder, num_tensors=18_867, num_bytes=256 * 1024)
        plan = make_copy_plan(open_checkpoint(folder).tensors.values())
    else:
        write_model(shape, folder)
        plan = make_load_plan(weight_layout(read_model_config(folder)), open_checkpoint(folder), "bfloat16")
    print(f"{shape}: {plan.file_bytes} bytes, {len(plan.extents)} extents", flush=True)
    with Arena.allocate(plan.num_bytes, bench.device) as arena:
        measure_host_tier(bench, shape, plan, arena)
        if shape != "small-tensors":
            measure_page_cache(bench, shape, plan, arena)
            if bench.args.cold_runs > 0:
                measure_disk(bench, shape, plan, arena)
        if shape == bench.args.shapes[0] and bench.args.pool_gib > 0:
            measure_pool(bench, shape, plan, arena)


def measure_libraries(bench: Bench, folders: dict[str, Path]) -> None:
    """All libraries on the same files, each in a process of its own that loads every shape."""
    paths = [path for folder in folders.values() for path in sorted(folder.glob("*.safetensors"))]
    num_loads = bench.args.library_runs
    bench.library_rows("page cache", folders, lambda: fill_page_cache(paths), num_loads=num_loads, num_rounds=1)
    if bench.args.cold_runs > 0:
        num_rounds = bench.args.cold_runs
        bench.library_rows("disk", folders, lambda: drop_page_cache(paths), num_loads=1, num_rounds=num_rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=["qwen3-8b", "qwen3-0.6b", "small-tensors"])
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--chunk-mib", type=int, default=16)
    parser.add_argument("--pool-gib", type=float, default=48)
    parser.add_argument("--pool-runs", type=int, default=2)
    parser.add_argument("--cold-runs", type=int, default=2)
    parser.add_argument("--library-runs", type=int, default=2, help="Warm loads by each library, in one process.")
    parser.add_argument("--libraries", nargs="*", default=PEERS, help="Peers to compare with.")
    parser.add_argument("--peers", type=Path, help="A folder that peers are imported from.")
    parser.add_argument("--scratch", type=Path, help="A folder on the disk that is measured.")
    args = parser.parse_args()
    bench = Bench(args)
    measure_limits(bench)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folders = {shape: Path(scratch, shape) for shape in args.shapes}
        for shape, folder in folders.items():
            measure_shape(bench, shape, folder)
        measure_libraries(bench, {shape: folder for shape, folder in folders.items() if shape != "small-tensors"})
    report("load", bench.rows, device=str(bench.device), threads=args.threads, chunk_mib=args.chunk_mib)


if __name__ == "__main__":
    main()
