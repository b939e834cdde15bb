"""Attention over fp8 caches against the definition in fp64 over what the caches hold, on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from ..tolerances import assert_near
from .test_ragged import OPTIONS, Case

FP8 = torch.float8_e4m3fn
pytestmark = pytest.mark.gpu


def _check(case: Case, *, groups=None, **options) -> None:
    """Hold a run over the case's cache in fp8, with factors by key head, to the definition."""
    num_kv_heads = case.k.shape[1]
    factors = {
        "k_scales_K": torch.linspace(0.5, 1.5, num_kv_heads),
        "v_scales_K": torch.linspace(2.0, 0.7, num_kv_heads),
    }
    k, v = case.k.to(FP8), case.v.to(FP8)
    case.k, case.v = (
        cache.double() * factor[:, None, None] for cache, factor in zip((k, v), factors.values(), strict=True)
    )
    expected = case.expected(**options)
    case.k, case.v = k, v
    named = {"sliding_window", "is_causal", "is_deterministic"}
    work = case.work(kv_dtype=FP8, **{name: options.pop(name) for name in named & options.keys()})
    got = case.run(groups=groups, work=work, **factors, **options)
    assert_near(got[0], expected[0], "attention")
    assert_near(got[1], expected[1], "log-sum-exp")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (3, 3, 128, 64), (4, 1, 256, 128)])
def test_many_rows_equal_the_definition(options, dtype, heads, kv_heads, head_dim, page):
    options = {**options, "sinks_H": options["sinks_H"][:heads]} if "sinks_H" in options else options
    _check(Case([1500, 400, 180], [200, 3, 50], heads, kv_heads, head_dim, page, dtype), **options)


def test_groups_change_no_result():
    case = Case([400 + 7 * s for s in range(5)], [1, 1, 1, 3, 40], 4, 2, 128, 64, torch.bfloat16)
    case.share(0, 4, 256)
    _check(case, groups=[[0, 4, 256]])


def test_every_number_of_a_cache_is_exact():
    """One key a sequence, so that each output is its value; all numbers that e4m3 has."""
    numbers = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    numbers = torch.where(numbers.isnan(), 0.0, numbers).view(2, 1, 1, 128)
    case = Case([32, 32], [32, 32], 2, 1, 128, 32, torch.bfloat16)
    case.v = numbers[torch.tensor([0, 1]).repeat(3)[: case.k.shape[0]]].expand(case.k.shape).contiguous()
    work = case.work(kv_dtype=FP8)
    ones = torch.ones(1)
    wanted = torch.stack([case.v[int(case.tables[s, 0]), 0, 0] for s in (0, 1)]).repeat_interleave(32, 0)
    case.k, case.v = case.k.nan_to_num().to(FP8), case.v.to(FP8)
    out, _ = case.run(work=work, k_scales_K=ones, v_scales_K=ones)
    assert torch.equal(out[:, 0].float(), wanted)
