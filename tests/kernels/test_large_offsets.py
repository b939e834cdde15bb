"""Pages beyond 2^32 elements of a cache, whose offsets 32 bits do not hold: they would lead to pages 1 and 2.

On a CPU such a cache is a file with holes: only the pages that a test touches take memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashtensors.kernels import pages
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork
from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.kernels.pages_kernel import (
    launch_copy_pages,
    launch_gather_pages,
    launch_move_tokens,
    launch_scatter_pages,
)
from flashtensors.kernels.rope import Rotation, inverse_frequencies, rotation
from flashtensors.kernels.rope_append import KvScales
from flashtensors.kernels.rope_append_kernel import launch_rope_append

from .tolerances import DEVICE, assert_near

NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM = 2, 128, 128
PAGE_SHAPE = (NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
PAGES_OF_2_32 = 2**32 // (NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM)
NEAR, FAR = (1, 2), (PAGES_OF_2_32 + 1, PAGES_OF_2_32 + 2)
NUM_PAGES = FAR[1] + 1

MakeCache = Callable[[], Tensor]


@pytest.fixture(params=[torch.float16, FP8_DTYPE], ids=str)
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> MakeCache:
    """Makes caches of a dtype, all zeros."""

    def make() -> Tensor:
        num_bytes = NUM_PAGES * torch.Size(PAGE_SHAPE).numel() * request.param.itemsize
        if DEVICE == "cuda":
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
        else:
            file = tmp_path / str(len(list(tmp_path.iterdir())))
            memory = torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)
        return memory.view(request.param).view(NUM_PAGES, *PAGE_SHAPE)

    return make


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("new_tokens", [1, 17], ids=["decode", "prefill"])
def test_attention_reads_the_right_page(make_cache: MakeCache, new_tokens: int) -> None:
    length = PAGE_SIZE + 20
    caches = make_cache(), make_cache()
    for cache in caches:
        for page in FAR:
            cache[page].copy_(torch.randn(PAGE_SHAPE))
    q = torch.randn(new_tokens, NUM_KV_HEADS, HEAD_DIM).to(device=DEVICE, dtype=torch.float16)
    work = AttentionWork(
        num_heads=NUM_KV_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, max_seqs=1, max_tokens=new_tokens,
        device=DEVICE, dtype=torch.float16, kv_dtype=caches[0].dtype,
    )  # fmt: skip
    work.plan(ids(0, new_tokens).int(), ids(length).int())
    out = ragged_attention(q, *caches, ids(*FAR).int()[None], work, scale=0.1)
    k_KLD, v_KLD = (torch.cat([cache[page].double() for page in FAR], 1)[:, :length] for cache in caches)
    scores_KTL = torch.einsum("tkd,kld->ktl", q.double(), k_KLD) * 0.1
    is_hidden_TL = torch.ones_like(scores_KTL[0], dtype=torch.bool).triu(length - new_tokens + 1)
    shares_KTL = scores_KTL.masked_fill(is_hidden_TL, float("-inf")).softmax(-1)
    assert_near(out, torch.einsum("ktl,kld->tkd", shares_KTL, v_KLD), "attention")


def test_appended_keys_and_values_reach_the_right_page(make_cache: MakeCache) -> None:
    offsets = 127, 0
    far, near = make_cache(), make_cache()
    dtype = far.dtype
    qkv = torch.randn(2, 3 * NUM_KV_HEADS * HEAD_DIM).to(device=DEVICE, dtype=torch.float16)
    turn = rotation(torch.arange(2) + 5, inverse_frequencies(HEAD_DIM, 10000.0), torch.float16)
    turn = Rotation(cos_T1D=turn.cos_T1D.to(DEVICE), sin_T1D=turn.sin_T1D.to(DEVICE))
    ones_K = torch.ones(NUM_KV_HEADS, device=DEVICE)
    scales = KvScales(k_scale_K=ones_K, v_scale_K=ones_K) if dtype == FP8_DTYPE else None
    out = torch.empty(2, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float16, device=DEVICE)
    small = [torch.zeros(3, *PAGE_SHAPE, device=DEVICE).to(dtype) for _ in range(2)]
    for caches, listed in (((far, near), FAR), (small, NEAR)):
        slots = ids(*(page * PAGE_SIZE + offset for page, offset in zip(listed, offsets, strict=True)))
        launch_rope_append(qkv, turn, *caches, slots, out, None, None, scales)
    for cache, wanted in zip((far, near), small, strict=True):
        assert as_bytes(wanted[1:]).any(-1).sum() == 4
        assert torch.equal(as_bytes(cache[FAR[0] :]), as_bytes(wanted[1:]))
        assert not as_bytes(cache[:3]).any()


def test_pages_and_tokens_move_from_and_to_the_right_page(make_cache: MakeCache) -> None:
    cache = make_cache()
    for page in (*FAR, *NEAR):
        cache[page].copy_(torch.randn(PAGE_SHAPE))
    cache_set = pages.make_cache_set([cache])
    expected = {page: as_bytes(cache[page]).clone() for page in (0, *NEAR, *FAR)}

    def check() -> None:
        assert [page for page, content in expected.items() if not torch.equal(as_bytes(cache[page]), content)] == []

    launch_copy_pages(cache_set, ids(FAR[1]), ids(FAR[0]))
    expected[FAR[0]] = expected[FAR[1]]
    check()
    gathered = torch.zeros(2, 1, *PAGE_SHAPE, device=DEVICE).to(cache.dtype)
    launch_gather_pages(cache_set, ids(FAR[1], NEAR[0]), gathered)
    assert torch.equal(as_bytes(gathered[0, 0]), expected[FAR[1]])
    launch_scatter_pages(gathered, cache_set, ids(-1, FAR[1]))
    expected[FAR[1]] = expected[NEAR[0]].clone()
    check()
    token = torch.zeros(1, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).to(cache.dtype)
    launch_move_tokens(cache, ids(FAR[0] * PAGE_SIZE + 9), token, is_scatter=False)
    assert torch.equal(as_bytes(token[0]), expected[FAR[0]][:, 9])
    launch_move_tokens(cache, ids(FAR[1] * PAGE_SIZE + 3), token, is_scatter=True)
    expected[FAR[1]][:, 3] = as_bytes(token[0])
    check()
