"""Attention over fp8 caches against the definition in fp64 over what the caches hold, on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from .cases import FP8, OPTIONS, Case, check_fp8

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (3, 3, 128, 64), (4, 1, 256, 128)])
def test_many_rows_equal_the_definition(options, dtype, heads, kv_heads, head_dim, page):
    options = {**options, "sinks_H": options["sinks_H"][:heads]} if "sinks_H" in options else options
    check_fp8(Case([1500, 400, 180], [200, 3, 50], heads, kv_heads, head_dim, page, dtype), **options)


def test_groups_change_no_result():
    case = Case([400 + 7 * s for s in range(5)], [1, 1, 1, 3, 40], 4, 2, 128, 64, torch.bfloat16)
    case.share(0, 4, 256)
    check_fp8(case, groups=[[0, 4, 256]])


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
