"""How near do the residency machine's swaps come to those of who knows the trace, over many traces and on any computer?

The machine of `flashtensors.residency` runs as it does in a worker; disk, link and device are numbers, near those of
`bench_zipf.py` on an H200. Each trace is also given to two offline policies: one knows when each model is wanted, one
knows how often. That every request is answered, the simulation asserts; what each waited is held against what the
machine promises. The rows with a hold ask what it would save to let requests for absent models wait for company; the
worker does not do that.

    python benchmarks/residency/bench_zipf_simulated.py --seeds 20
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.record import report, spread
from benchmarks.residency.simulated_owner import Machine, SimulatedOwner
from benchmarks.residency.waiting_bound import compare
from benchmarks.residency.zipf_trace import count_offline_swaps, make_trace
from flashtensors.residency.machine import Residency
from flashtensors.residency.tiers import Tier

MACHINE = Machine(kv_bytes=204 * 10**6, first_token_s=0.003, answer_s=0.065)
"""17 places: weights and a KV cache of 134 MB take 0.7 GB in whole handles."""
SWAP_S = 0.2
"""What a swap takes the offline policies: between one from disk and one from host memory, as most are from disk."""


def measure(machine: Machine, *, seconds: float, requests_per_s: float, num_seeds: int) -> dict[str, Any]:
    """One row: traces of one length, seeds 0, 1, 2 and so on."""
    samples: dict[str, list[float]] = {"swaps": [], "ratio_to_arrivals": [], "ratio_to_popularity": []}
    popularity_to_arrivals: list[float] = []
    waits_s: dict[Tier, list[float]] = {tier: [] for tier in Tier}
    all_waits_s: list[float] = []
    bounds_s: list[float] = []
    for seed in range(num_seeds):
        trace = make_trace(num_models=100, exponent=1.1, requests_per_s=requests_per_s, duration_s=seconds, seed=seed)
        residency = Residency(machine.device_bytes, keep_alive_s=-1, host_bytes=machine.host_bytes)
        outcome = SimulatedOwner(machine, residency).run(trace)
        times_s = {"swap_s": SWAP_S, "answer_s": machine.first_token_s + machine.answer_s}
        arrivals = count_offline_swaps(trace, machine.num_places, **times_s)
        popularity = count_offline_swaps(trace, machine.num_places, knows_arrivals=False, **times_s)
        samples["swaps"].append(outcome.num_swaps)
        samples["ratio_to_arrivals"].append(outcome.num_swaps / arrivals)
        samples["ratio_to_popularity"].append(outcome.num_swaps / popularity)
        popularity_to_arrivals.append(popularity / arrivals)
        all_waits_s += [wait_s for wait_s, _ in outcome.waits]
        bounds_s += outcome.bounds_s
        for tier in Tier:
            waits_s[tier] += outcome.tier_waits_s[tier]
    return {
        "seconds": seconds,
        "hold_s": machine.hold_s,
        "places": machine.num_places,
        **{name: spread(values) for name, values in samples.items()},
        "popularity_to_arrivals": spread(popularity_to_arrivals),
        "waiting": compare(all_waits_s, bounds_s),
        "first_token_ms": {tier.value: _percentiles_ms(waits_s[tier]) for tier in Tier if waits_s[tier]},
    }


def _percentiles_ms(waits_s: list[float]) -> dict[str, float]:
    ordered = sorted(waits_s)
    return {
        "num": len(ordered),
        "p50": round(1e3 * statistics.median(ordered), 2),
        "p99": round(1e3 * ordered[int(0.99 * len(ordered))], 2),
        "max": round(1e3 * ordered[-1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="Traces of each length.")
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0, 300.0], help="Lengths of traces.")
    parser.add_argument("--holds", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="See `Machine.hold_s`.")
    parser.add_argument("--rate", type=float, default=10.0, help="Requests per second.")
    parser.add_argument("--disk-gb-per-s", type=float, default=MACHINE.disk_bytes_per_s / 1e9)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seconds, hold_s in itertools.product(args.seconds, args.holds):
        machine = replace(MACHINE, disk_bytes_per_s=args.disk_gb_per_s * 1e9, hold_s=hold_s)
        rows.append(measure(machine, seconds=seconds, requests_per_s=args.rate, num_seeds=args.seeds))
        print(rows[-1], flush=True)
    report("zipf-simulated", rows, **vars(args))


if __name__ == "__main__":
    main()
