"""The Hopper kernel compiles without a GPU, to the instructions it is written for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"
SHARED_BYTES_OF_A_BLOCK = 232_448


@pytest.mark.parametrize(
    ("head_dim", "cache"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp8e4nv"), (128, "fp8e4nv")]
)
def test_compiles_to_the_matrix_units_and_fits_shared_memory(head_dim, cache, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, SCRIPT, str(head_dim), cache], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["shared_bytes"] <= SHARED_BYTES_OF_A_BLOCK
    assert found["wgmma.mma_async"] > 0
    assert found["cp.async.bulk.tensor"] > 0
    assert found["setmaxnreg"] > 0
