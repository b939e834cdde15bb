"""Paged attention against a brute-force oracle in fp64, for every mix of prefill, append and decode."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels.attention import plan
from flashtensors.kernels.attention.batch import AttentionBatch
from flashtensors.kernels.attention.paged import append_kv, paged_attention, paged_attention_reference

from ..tolerances import assert_near

MIXES: dict[str, list[tuple[int, int]]] = {
    "prefill": [(0, 7)],
    "prefill_one_token": [(0, 1)],
    "prefill_several": [(0, 33), (0, 5)],
    "prefill_one_more_than_a_tile": [(0, 65)],
    "append": [(20, 5)],
    "decode_one": [(40, 1)],
    "decode_alike": [(31, 1), (31, 1)],
    "decode_ragged": [(3, 1), (64, 1), (17, 1)],
    "mixed": [(12, 1), (0, 20), (50, 1), (18, 6), (0, 1)],
    "empty": [],
}
"""For each sequence, the tokens it has and the tokens it gains."""


@dataclasses.dataclass
class Case:
    """A batch on a device, and the same tokens as plain fp64 sequences."""

    batch: AttentionBatch
    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    keys: list[Tensor]
    """fp64 `[length, K, D]` of each sequence."""
    values: list[Tensor]

    def run(self, **options: float | int | None) -> Tensor:
        append_kv(self.k_TKD, self.v_TKD, self.k_cache, self.v_cache, self.batch)
        return paged_attention(self.q_THD, self.k_cache, self.v_cache, self.batch, **options)  # pyright: ignore

    def expected(self, *, scale: float, sliding_window: int | None = None, softcap: float | None = None) -> Tensor:
        out = torch.zeros_like(self.q_THD, dtype=torch.float64)
        group = self.q_THD.shape[1] // self.k_TKD.shape[1]
        for (start, num, length), keys, values in zip(self.batch.spans, self.keys, self.values, strict=True):
            for i in range(num):
                position = length - num + i
                first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                for head in range(self.q_THD.shape[1]):
                    k, v = keys[first : position + 1, head // group], values[first : position + 1, head // group]
                    scores = (k * self.q_THD[start + i, head].double()).sum(-1) * scale
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    weights = torch.exp(scores - scores.max())
                    out[start + i, head] = (weights[:, None] * v).sum(0) / weights.sum()
        return out


def make_case(
    mix: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Sequences in permuted blocks of caches that hold NaN wherever no token was written."""
    random = torch.Generator().manual_seed(0)
    num_tokens = sum(num for _, num in mix)
    tables_needed = [math.ceil((past + num) / block_size) for past, num in mix]
    order = torch.randperm(sum(tables_needed) + 3, generator=random).tolist()
    max_blocks = max(tables_needed, default=0) + 1
    shape = (len(order), num_kv_heads, block_size, head_dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    tables, slots, spans, keys, values = [], [], [], [], []
    for (past, num), num_blocks in zip(mix, tables_needed, strict=True):
        table = [order.pop() for _ in range(num_blocks)]
        pair = [torch.randn(past + num, num_kv_heads, head_dim, generator=random).to(dtype) for _ in range(2)]
        for position in range(past + num):
            block, offset = table[position // block_size], position % block_size
            if position >= past:
                slots.append(block * block_size + offset)
            else:
                for cache, tokens in zip(caches, pair, strict=True):
                    cache[block, :, offset] = tokens[position]
        tables.append(table + [order[0]] * (max_blocks - num_blocks))  # order[0] is a block of NaN
        spans.append((sum(span[1] for span in spans), num, past + num))
        keys.append(pair[0])
        values.append(pair[1])
    starts = [span[0] for span in spans] + [num_tokens]
    empty = [torch.empty(0, num_kv_heads, head_dim, dtype=dtype)]
    # q, k and v are slices of one projection, as in a model: rows are not contiguous
    q = torch.randn(num_tokens, num_heads, head_dim, generator=random).to(dtype)
    k, v = (torch.cat([t[-num:] for t, (_, num) in zip(of, mix, strict=True)] or empty) for of in (keys, values))
    q_THD, k_TKD, v_TKD = torch.cat((q, k, v), 1).to(device).split((num_heads, num_kv_heads, num_kv_heads), 1)
    batch = AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        kv_lengths=torch.tensor([span[2] for span in spans], dtype=torch.int32, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device).view(len(mix), max_blocks),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        spans=tuple(spans),
    )
    k_cache, v_cache = (cache.to(device) for cache in caches)
    keys, values = ([tokens.double().to(device) for tokens in of] for of in (keys, values))
    return Case(batch, q_THD, k_TKD, v_TKD, k_cache, v_cache, keys, values)


def assert_right(case: Case, **options: float | int | None) -> None:
    out = case.run(**options)
    assert out.dtype == case.q_THD.dtype
    assert out.shape == case.q_THD.shape
    assert_near(out, case.expected(**options), "attention")  # pyright: ignore


@pytest.mark.parametrize("options", [{}, {"sliding_window": 8}, {"softcap": 2.0}, {"sliding_window": 18, "softcap": 5}])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_every_mix_is_right(mix: list[tuple[int, int]], options: dict[str, float]) -> None:
    assert_right(make_case(mix), scale=0.125, **options)


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_dim_and_block_size_is_right(head_dim: int, block_size: int) -> None:
    assert_right(make_case(MIXES["mixed"], head_dim=head_dim, block_size=block_size), scale=head_dim**-0.5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (4, 1), (9, 3), (8, 2)])
@pytest.mark.parametrize("window", [None, 11])
def test_every_grouping_of_heads_is_right(num_heads: int, num_kv_heads: int, window: int | None) -> None:
    case = make_case(MIXES["mixed"], num_heads=num_heads, num_kv_heads=num_kv_heads)
    assert_right(case, scale=0.2, sliding_window=window)


@pytest.mark.parametrize("max_tokens", [1, 60, 100, 400])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 18}, {"softcap": 2.0}])
def test_decodes_that_are_gathered_in_groups_are_right(
    max_tokens: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GATHERED_BYTES", max_tokens * 2 * 64 * 4)
    mix = [(12, 1), (0, 20), (50, 1), (5, 1), (18, 6), (90, 1), (0, 1), (89, 1)]
    assert_right(make_case(mix), scale=0.125, **options)
    assert_right(make_case([span for span in mix if span[1] == 1]), scale=0.125, **options)


@pytest.mark.parametrize("sliding_window", [None, 700])
def test_a_group_gathers_no_more_than_it_may_and_every_decode_is_in_one(sliding_window: int | None) -> None:
    lengths = [1 + 37 * number % 1000 for number in range(200)]
    case = make_case([(length - 1, 1) for length in lengths], num_heads=2, num_kv_heads=1, head_dim=512)
    planned = plan.plan_attention(case.batch, case.k_cache, sliding_window=sliding_window, dtype=torch.float32)
    rows = [group.query_rows_S for group in planned.decodes]
    assert len(rows) > 10
    assert sorted(row for each in rows if each is not None for row in each.tolist()) == list(range(200))
    assert all(group.cache_rows.numel() * 512 * 4 <= plan.GATHERED_BYTES for group in planned.decodes)
    num_read = sum(min(length, sliding_window or length) for length in lengths)
    assert sum(group.cache_rows.numel() for group in planned.decodes) < 1.1 * num_read, "like lengths go together"


def test_a_soft_cap_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="softcap is 0"):
        make_case([(5, 1)]).run(scale=0.1, softcap=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_half_precision_is_right_within_its_rounding(dtype: torch.dtype, softcap: float | None) -> None:
    assert_right(make_case(MIXES["mixed"], dtype=dtype), scale=0.125, softcap=softcap)


def test_reference_is_right() -> None:
    case = make_case([(5, 1), (0, 4), (3, 2)], head_dim=8, block_size=4)
    append_kv(case.k_TKD, case.v_TKD, case.k_cache, case.v_cache, case.batch)
    options = {"scale": 0.3, "sliding_window": 3, "softcap": 2.0}
    out = paged_attention_reference(case.q_THD, case.k_cache, case.v_cache, case.batch, **options)  # pyright: ignore
    torch.testing.assert_close(out.double(), case.expected(**options), rtol=1e-5, atol=1e-5)  # pyright: ignore


def test_append_writes_the_new_tokens_and_nothing_else() -> None:
    case = make_case(MIXES["mixed"])
    before = case.k_cache.clone()
    append_kv(case.k_TKD, case.v_TKD, case.k_cache, case.v_cache, case.batch)
    for row, slot in enumerate(case.batch.slot_mapping.tolist()):
        block, offset = divmod(slot, case.k_cache.shape[2])
        assert torch.equal(case.k_cache[block, :, offset], case.k_TKD[row])
        assert torch.equal(case.v_cache[block, :, offset], case.v_TKD[row])
        case.k_cache[block, :, offset] = before[block, :, offset]
    assert torch.equal(case.k_cache.isnan(), before.isnan())
    assert torch.equal(case.k_cache.nan_to_num(), before.nan_to_num())


def test_layers_of_different_windows_share_a_batch() -> None:
    case = make_case(MIXES["mixed"])
    for window in (None, 8, None, 8):
        assert_right(case, scale=0.125, sliding_window=window)
    assert len(case.batch.plans) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 8}, {"softcap": 2.0}])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_a_gpu_is_right(dtype: torch.dtype, options: dict[str, float], head_dim: int) -> None:
    for mix in MIXES.values():
        assert_right(make_case(mix, dtype=dtype, head_dim=head_dim, device="cuda"), scale=head_dim**-0.5, **options)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_gpu_is_not_waited_for() -> None:
    case = make_case(MIXES["mixed"], device="cuda")
    case.run(scale=0.125)
    fresh = dataclasses.replace(case, batch=dataclasses.replace(case.batch))
    torch.cuda.set_sync_debug_mode("error")
    try:
        fresh.run(scale=0.125, sliding_window=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
