"""The Hopper kernel compiles without a GPU, to the instructions it is written for."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from ..compile_apart import compile_apart

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"
SHARED_BYTES_OF_A_BLOCK = 232_448


@pytest.mark.parametrize(
    ("head_dim", "cache"), [(64, "bf16"), (128, "bf16"), (256, "bf16"), (64, "fp8e4nv"), (128, "fp8e4nv")]
)
def test_compiles_to_the_matrix_units_and_fits_shared_memory(head_dim, cache, tmp_path):
    found = compile_apart(SCRIPT, head_dim, cache, cache=tmp_path)
    assert found["shared_bytes"] <= SHARED_BYTES_OF_A_BLOCK
    assert found["wgmma.mma_async"] > 0
    assert found["cp.async.bulk.tensor"] > 0
    assert found["setmaxnreg"] > 0
