"""How fast is memory made ready: the host pool against cudaHostAlloc, and device memory mapped to an arena and away?

The host pool is made several times: a virtual machine gets much of its memory from its host when it touches it first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread

from flashtensors.memory.cuda_driver import CudaMemoryDriver
from flashtensors.memory.device_pool import DevicePool
from flashtensors.memory.host_pool import HostPool
from flashtensors.memory.pinning import find_pinning
from flashtensors.memory.weight_arena import WeightArena

GIB = 1024**3
CHUNK_BYTES = 16 * 1024**2


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def host_alloc_s(num_bytes: int) -> float:
    """Page-locked memory as torch gets it, with cudaHostAlloc."""
    return seconds(lambda: torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True))


def host_pool_s(num_bytes: int, num_threads: int) -> dict[str, float]:
    """Until the first page, until all, and until all is given back."""
    started = time.perf_counter()
    pool = HostPool(num_bytes, chunk_bytes=CHUNK_BYTES, pinning=find_pinning("cuda"), num_threads=num_threads)
    pool.wait(1)
    first_s = time.perf_counter() - started
    pool.wait()
    ready_s = time.perf_counter() - started
    if pool.pinned_bytes != pool.num_bytes:
        raise SystemExit(f"not all of the pool is pinned: {pool.pinning_problem}")
    return {"first": first_s, "ready": ready_s, "close": seconds(pool.close)}


def arena_ms(num_bytes: int, repeats: int) -> dict[str, list[float]]:
    """Mapping and unmapping an arena, the handles made beforehand."""
    samples: dict[str, list[float]] = {"map": [], "unmap": []}
    driver = CudaMemoryDriver("cuda")
    with DevicePool(driver, num_bytes) as pool:
        handles: list[int] = []
        samples["create"] = [1e3 * seconds(lambda: handles.extend(pool.take(pool.num_handles)))]
        pool.give_back(handles)
        with WeightArena(pool, pool.num_handles * pool.handle_bytes) as arena:
            for _ in range(repeats):
                samples["map"].append(1e3 * seconds(arena.map))
                arena.bytes_B[-1].fill_(1)
                torch.cuda.synchronize()
                samples["unmap"].append(1e3 * seconds(arena.unmap))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host-gib", type=int, default=48)
    parser.add_argument("--device-gib", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.zeros(1, device="cuda")
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    host_bytes = args.host_gib * GIB
    add(case="cudaHostAlloc", gigabytes_per_second=spread([8 * GIB / host_alloc_s(8 * GIB) / 1e9]))
    first_time = host_pool_s(host_bytes, max(args.threads))
    add(case="host pool, first time", gigabytes_per_second=spread([host_bytes / first_time["ready"] / 1e9]))
    for num_threads in args.threads:
        timings = [host_pool_s(host_bytes, num_threads) for _ in range(args.repeats)]
        rates = [host_bytes / timing["ready"] / 1e9 for timing in timings]
        add(
            case="host pool",
            threads=num_threads,
            gigabytes_per_second=spread(rates),
            first_page_seconds=spread([timing["first"] for timing in timings]),
            close_seconds=spread([timing["close"] for timing in timings]),
        )
    for step, samples in arena_ms(args.device_gib * GIB, 5).items():
        add(case=f"arena of {args.device_gib} GiB: {step}", milliseconds=spread(samples))
    report("pool", rows)


if __name__ == "__main__":
    main()
