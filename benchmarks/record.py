"""What every benchmark result carries: where, when and on what it was measured; the last line printed is that JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def spread(samples: list[float]) -> dict[str, float]:
    """Median and range of repeated measurements, rounded to what can be read."""
    return {
        "median": round(statistics.median(samples), 4),
        "min": round(min(samples), 4),
        "max": round(max(samples), 4),
        "n": len(samples),
    }


def environment() -> dict[str, Any]:
    """Hardware, versions, git revision (`GIT_REVISION` where there is only a copy of the tree), command and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "git_revision": os.environ.get("GIT_REVISION") or _output("git", "describe", "--always", "--dirty"),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "flashtensors")},
    }


def report(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write `results/<date>-<name>.json` and print the same JSON as the last line of output."""
    result = {"benchmark": name, **environment(), **facts, "rows": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = Path(os.environ.get("OUT", RESULTS)) / f"{result['date'][:10]}-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
