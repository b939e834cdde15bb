"""Compiling kernels without a GPU, in a process of its own: this one may run them in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path


def compile_apart(script: Path, *arguments: object, cache: Path, **environment: str) -> dict[str, int]:
    """Run `script`, which compiles a kernel and prints what it found as JSON; returns that.

    Args:
        script: One of the `compile_*_for_hopper.py`.
        arguments: Its own.
        cache: Where Triton keeps binaries.
        environment: More variables.
    """
    run = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), **environment},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)
