"""How long does a request wait for a model that is in host memory, and what does a swap cost those who do not?

The floor of a swap is its bytes over the rate of a pinned copy that was measured in the same run without the package's
code. Greedy answers after the swaps are held against those before. What must not happen during a swap of a known model
(captures, compilations, allocations, pinning, opening of files) is counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "transfer"))
from record import report, spread

from checkpoints import write_model  # isort: skip
from machine_limits import fill_page_cache, pinned_copy_rate  # isort: skip

CHECKPOINTS = {
    "siblings": ["8b-a", "8b-b", "1b"],
    "large": ["8b-a", "32b"],
    "files": ["8b-a", "8b-b"],
    "beside": ["8b-a", "8b-b", "8b-c"],
    "kept": ["half-0", "half-1"],
    "endurance": ["half-0", "half-1"],
    "start": ["8b-a"],
}
"""What each phase needs."""


def write_checkpoint(folder: Path, model: str) -> None:
    """Write one model unless it is there; all 8B models are siblings, and the 32B model is hollow."""
    path = folder / model
    if path.exists():
        return
    if model == "32b":
        write_model("qwen3-32b", path, is_sparse=True)
    elif model == "1b":
        write_model("llama-3.2-1b", path)
    elif model.startswith("half"):
        write_model("half-gigabyte", path, seed=int(model[-1]))
    else:
        like = None if model == "8b-a" else folder / "8b-a"
        write_model("qwen3-8b", path, seed=ord(model[-1]), like=like)


def run_phase(phase: str, folder: Path, link_gb_per_s: float) -> list[dict[str, Any]]:
    """The rows of one phase; none where it broke, which is printed."""
    if phase == "start":
        return measure_start(folder / "8b-a")
    command = [sys.executable, str(Path(__file__).parent / "swap_phases.py"), phase, str(folder), str(link_gb_per_s)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=240, check=False)
    rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode != 0:
        print(f"{phase}: exit status {ended.returncode}", flush=True)
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def measure_start(folder: Path) -> list[dict[str, Any]]:
    """Processes from their start to the first token of a model whose files are in the page cache."""
    fill_page_cache(sorted(folder.glob("*.safetensors")))
    results: list[dict[str, Any]] = []
    for _ in range(3):
        command = [sys.executable, str(Path(__file__).parent / "start_once.py"), str(folder), str(time.time())]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=240, check=False)
        if ended.returncode != 0:
            print(f"start: exit status {ended.returncode}", flush=True)
            return []
        results.append(json.loads(ended.stdout.splitlines()[-1]))
    marks = {name: [result["marks"][name] for result in results] for name in results[0]["marks"]}
    row: dict[str, Any] = {
        "case": "process start to first token, page cache",
        "model": folder.name,
        "seconds": {name: spread(seconds) for name, seconds in marks.items()},
        "after_imports_seconds": spread([r["marks"]["first token"] - r["marks"]["imports"] for r in results]),
        "phase_seconds": results[-1]["phase_seconds"],
    }
    print(json.dumps(row), flush=True)
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phases", nargs="+", default=list(CHECKPOINTS), choices=list(CHECKPOINTS))
    parser.add_argument("--scratch", type=Path, help="A folder on a disk with room for 30 GB.")
    args = parser.parse_args()
    link_gb_per_s = pinned_copy_rate(torch.device("cuda"))
    print(f"pinned copy: {link_gb_per_s:.2f} GB/s", flush=True)
    torch.cuda.empty_cache()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        for model in dict.fromkeys(model for phase in args.phases for model in CHECKPOINTS[phase]):
            write_checkpoint(folder, model)
        for phase in args.phases:
            started_s = time.monotonic()
            rows += run_phase(phase, folder, link_gb_per_s)
            print(f"{phase}: {time.monotonic() - started_s:.1f} s", flush=True)
    name = "swap" if set(args.phases) == set(CHECKPOINTS) else f"swap-{'-'.join(args.phases)}"
    report(name, rows, pinned_copy_gb_per_s=round(link_gb_per_s, 2))


if __name__ == "__main__":
    main()
