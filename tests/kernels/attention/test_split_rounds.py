"""Programs of the split kernel that take several items, split and whole ones in turn."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ..compile_apart import compile_apart
from ..tolerances import assert_near
from .cases import Case

SCRIPT = Path(__file__).parent / "compile_split_for_hopper.py"


@pytest.mark.parametrize("head_dim", [64, 256])
def test_all_of_the_next_item_is_carried_over(head_dim, tmp_path) -> None:
    """Triton before 3.8 drops a value that only the bounds of an inner loop use: items began at another one's keys."""
    found = compile_apart(SCRIPT, head_dim, "bf16", cache=tmp_path)
    assert found["ttir"] == found["ttgir"] >= 10


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp8_is_read_in_pairs_and_fits_ada(head_dim, tmp_path) -> None:
    found = compile_apart(SCRIPT, head_dim, "fp8", cache=tmp_path)
    assert found["byte_loads"] == 0
    assert found["shared_bytes"] <= 99 << 10


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)])
@pytest.mark.parametrize("num_seqs", [6, 32, 100])
def test_unequal_decodes_equal_the_definition(num_seqs, head_dim, dtype) -> None:
    lengths = [random.Random(s).randint(100, 2000) for s in range(num_seqs)]
    case = Case(lengths, [1] * num_seqs, 16, 8, head_dim, 64, dtype)
    planned = case.work(can_stream=False)
    out, lse = case.run(work=planned)
    expected_out, expected_lse = case.expected()
    assert_near(out, expected_out, "attention")
    assert_near(lse, expected_lse, "log-sum-exp")
    assert not planned.has_stream
