"""How long from `flash run` to the first text: with the daemon stopped, with it running, with the model loaded?

The command is started with its output on a pipe; the clock stops at the first byte of the answer. The floor in the same
run is what a process must pay anyway: starting Python and importing torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread

FLASH = [sys.executable, "-m", "flashtensors.cli.main"]


def first_byte_s(model: str, prompt: str) -> float:
    """Seconds from starting `flash run` to the first byte of its answer."""
    started = time.perf_counter()
    with subprocess.Popen([*FLASH, "run", model, prompt, "--max-tokens", "8"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        elapsed = time.perf_counter() - started
        process.stdout.read()
    if process.returncode != 0 or not byte:
        raise SystemExit(f"flash run failed with exit code {process.returncode}")
    return elapsed


def flash(*arguments: str) -> None:
    subprocess.run([*FLASH, *arguments], check=True, stdout=subprocess.DEVNULL)


def import_torch_s() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    flash("pull", args.model)
    samples: dict[str, list[float]] = {
        "import_torch": [],
        "stopped_daemon": [],
        "loaded_model": [],
        "unloaded_model": [],
    }
    for _ in range(args.runs):
        subprocess.run([*FLASH, "stop"], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        samples["import_torch"].append(import_torch_s())
        samples["stopped_daemon"].append(first_byte_s(args.model, args.prompt))
        samples["loaded_model"].append(first_byte_s(args.model, args.prompt))
        flash("unload", args.model)
        samples["unloaded_model"].append(first_byte_s(args.model, args.prompt))
    flash("stop")
    rows = [{"case": case, "seconds": spread(values)} for case, values in samples.items()]
    report("first-token", rows, model=args.model)


if __name__ == "__main__":
    main()
