"""What does it save, and cost, to spare models that would have to be read from the disk again?

The machine of `flashtensors.residency` with several values of `ledger.DISK_FACTOR`: 1 counts every eviction as one to
host memory, infinity by all of the time that the disk would take. Disk, link and device are numbers; the traces of one
workload are the same for each value.

    python benchmarks/residency/bench_eviction_cost.py --seeds 10
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.record import report
from benchmarks.residency.simulated_owner import GB, Machine, Outcome, SimulatedOwner
from benchmarks.residency.zipf_trace import make_trace
from flashtensors.residency import ledger
from flashtensors.residency.machine import Residency


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Models by Zipf's law, of sizes that are drawn for each trace."""

    sizes_gb: tuple[float, ...]
    num_models: int = 100
    exponent: float = 1.1
    requests_per_s: float = 10.0
    seconds: float = 300.0
    device_gb: int
    host_gb: int

    def run(self, seed: int) -> Outcome:
        """One trace."""
        rng = random.Random(seed)
        weights = tuple(int(rng.choice(self.sizes_gb) * GB) for _ in range(self.num_models))
        machine = Machine(
            weight_bytes=max(weights),
            weights=weights,
            kv_bytes=204 * 10**6,
            device_bytes=self.device_gb * GB,
            host_bytes=self.host_gb * GB,
            first_token_s=0.003,
            answer_s=0.065,
        )
        trace = make_trace(
            num_models=self.num_models,
            exponent=self.exponent,
            requests_per_s=self.requests_per_s,
            duration_s=self.seconds,
            seed=seed,
        )
        residency = Residency(machine.device_bytes, keep_alive_s=-1, host_bytes=machine.host_bytes)
        return SimulatedOwner(machine, residency).run(trace)


WORKLOADS = {
    "equal, 0.5 GB": Workload(sizes_gb=(0.5,), device_gb=12, host_gb=24),
    "0.125 to 2 GB": Workload(sizes_gb=(0.125, 0.25, 0.5, 1.0, 2.0), device_gb=18, host_gb=36),
    "0.125 or 4 GB": Workload(sizes_gb=(0.125, 4.0), device_gb=40, host_gb=60, requests_per_s=5.0),
    "eight of 40 GB": Workload(
        sizes_gb=(40.0,),
        num_models=8,
        exponent=0.6,
        requests_per_s=0.05,
        seconds=36_000.0,
        device_gb=130,
        host_gb=100,
    ),
}


def measure(name: str, factor: float, num_seeds: int) -> dict[str, Any]:
    """One row: means over traces."""
    ledger.DISK_FACTOR = factor
    outcomes = [WORKLOADS[name].run(seed) for seed in range(num_seeds)]
    waits_s = sorted(wait_s for outcome in outcomes for wait_s, _ in outcome.waits)
    return {
        "workload": name,
        "disk_factor": str(factor),
        "swaps": statistics.mean(outcome.num_swaps for outcome in outcomes),
        "disk_gb": round(statistics.mean(outcome.disk_bytes for outcome in outcomes) / GB, 1),
        "mean_wait_ms": round(1e3 * statistics.mean(waits_s), 2),
        "p99_wait_ms": round(1e3 * waits_s[int(0.99 * len(waits_s))], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="Traces of each workload.")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 2.0, 4.0, math.inf], help="See DISK_FACTOR.")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in WORKLOADS:
        for factor in args.factors:
            rows.append(measure(name, factor, args.seeds))
            print(rows[-1], flush=True)
    report("eviction-cost", rows, seeds=args.seeds, factors=[str(factor) for factor in args.factors])


if __name__ == "__main__":
    main()
