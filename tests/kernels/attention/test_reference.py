"""What a CPU attends with, against the definition in fp64, and the door's way to it where no kernel can run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.attention import work as attention_work
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.reference import ragged_attention_reference
from flashtensors.kernels.attention.work import AttentionWork

from . import cases
from .cases import OPTIONS, SHAPES, Case, assert_equal, check_fp8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setattr(attention_work, "runs_triton", lambda device: False)
    monkeypatch.setattr(cases, "DEVICE", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_definition(shape, dtype):
    case = Case(*shape, dtype)
    assert_equal(case.run(), case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_the_definition(options, dtype):
    case = Case([150, 40, 64, 300], [20, 3, 18, 130], 4, 2, 64, 16, dtype)
    assert_equal(case.run(**options), case.expected(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_fp8_caches_equal_the_definition(options, dtype):
    check_fp8(Case([150, 40, 64], [20, 3, 18], 4, 2, 64, 16, dtype), **options)


@pytest.mark.parametrize("window", [None, 6])
def test_tree_mask(window):
    case = Case([150, 40], [8, 5], 4, 2, 64, 16, torch.float32)
    options = {
        "tree_mask_T": torch.tensor([1, 3, 5, 11, 17, 33, 65, 255, 1, 31, 7, 9, 17]),  # one has bits of later tokens
        "sliding_window": window,
    }
    assert_equal(case.run(**options), case.expected(**options))


@pytest.mark.parametrize("sink", [None, 0.5, float("-inf")])
def test_rows_that_see_nothing_are_zeros(sink):
    case = Case([3, 20], [3, 2], 4, 2, 64, 16, torch.float32)
    tree_mask_T = torch.tensor([0, 0, 5, 0, 3])
    sinks_H = None if sink is None else torch.full((4,), sink)
    out, lse = case.run(tree_mask_T=tree_mask_T, sinks_H=sinks_H)
    assert not out[:2].any()
    assert (lse[:2] == (float("-inf") if sink is None else sink)).all()
    expected = case.expected(tree_mask_T=tree_mask_T, sinks_H=sinks_H)
    assert_equal((out[2:], lse[2:]), (expected[0][2:], expected[1][2:]))


def test_padding_is_left_as_it_is():
    case = Case([70, 33], [1, 4], 4, 2, 64, 16, torch.float32)
    work = AttentionWork(
        num_heads=4, num_kv_heads=2, head_dim=64, max_seqs=4, max_tokens=9, device="cpu", dtype=torch.float32
    )
    work.plan(torch.tensor([0, 1, 5, 5], dtype=torch.int32), torch.tensor([70, 33, 0], dtype=torch.int32))
    q, out, lse = torch.zeros(9, 4, 64), torch.full((9, 4, 64), 7.0), torch.full((9, 4), 7.0)
    q[:5] = case.q
    tables = torch.cat([case.tables, torch.full_like(case.tables[:1], 1 << 20)])
    assert ragged_attention(q, case.k, case.v, tables, work, scale=0.1, lse_TH=lse, out_THD=out) is out
    assert_equal((out[:5], lse[:5]), case.expected())
    assert (out[5:] == 7.0).all()
    assert (lse[5:] == 7.0).all()


def test_an_empty_batch_is_no_work():
    case = Case([5], [1], 4, 2, 64, 16, torch.float32)
    work = case.work()
    work.plan(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    arguments = case.q[:0], case.k, case.v, case.tables[:0], work
    for attend in (ragged_attention, ragged_attention_reference):
        assert attend(*arguments, scale=0.1).shape == (0, 4, 64)


def test_a_batch_that_was_not_planned_is_refused():
    case = Case([5], [1], 4, 2, 64, 16, torch.float32)
    for attend in (ragged_attention, ragged_attention_reference):
        with pytest.raises(ConfigError, match=r"call work\.plan"):
            attend(case.q, case.k, case.v, case.tables, case.work(), scale=0.1)


SCRIPT = """
import sys
if {is_blocked}:
    sys.modules["triton"] = None  # importing it raises ImportError, as where it is not installed
import torch
from tests.kernels.attention.cases import Case, assert_equal
case = Case([150, 40], [20, 1], 4, 2, 64, 16, torch.float32)
work = case.work()
assert not work.has_kernels
assert_equal(case.run(work=work), case.expected())
assert not [name for name in sys.modules if name.startswith("triton") and {is_blocked} and name != "triton"]
"""


@pytest.mark.parametrize("is_blocked", [False, True], ids=["no interpreter", "no triton"])
def test_a_cpu_needs_no_triton(is_blocked):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(is_blocked=is_blocked)], check=True, cwd=ROOT, timeout=120,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
