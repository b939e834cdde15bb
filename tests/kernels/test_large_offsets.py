"""Pages, rows and experts whose offsets 32 bits do not hold.

Pages lie beyond 2^32 elements, and would be taken for pages 1 and 2. Of rows and experts the last begins at 2^31, which
would be taken for as many elements before the first: those are there too, and zero.

On a CPU such a tensor is a file with holes: only the parts that a test touches take memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from flashtensors.kernels import pages
from flashtensors.kernels.activation_kernel import launch_gated_product
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork
from flashtensors.kernels.embedding_kernel import launch_embed
from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.kernels.logprobs_kernel import launch_token_logprobs
from flashtensors.kernels.moe_kernel import launch_moe
from flashtensors.kernels.norm_kernel import launch_add_rms_norm, launch_rms_norm
from flashtensors.kernels.pages_kernel import (
    launch_copy_pages,
    launch_gather_pages,
    launch_move_tokens,
    launch_scatter_pages,
)
from flashtensors.kernels.penalties import Penalties
from flashtensors.kernels.penalties_kernel import launch_add_bias, launch_penalise
from flashtensors.kernels.rope import Rotation, inverse_frequencies, rotation
from flashtensors.kernels.rope_append import KvScales
from flashtensors.kernels.rope_append_kernel import launch_rope_append
from flashtensors.kernels.sampling_launch import launch_sample

from .sampling_oracle import make_rows
from .tolerances import DEVICE, assert_near

NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM = 2, 128, 128
PAGE_SHAPE = (NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM)
PAGES_OF_2_32 = 2**32 // (NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM)
NEAR, FAR = (1, 2), (PAGES_OF_2_32 + 1, PAGES_OF_2_32 + 2)
NUM_PAGES = FAR[1] + 1

NUM_ROWS, ROW_STRIDE = 3, 2**30

MakeZeros = Callable[..., Tensor]
MakeCache = Callable[[], Tensor]


@pytest.fixture
def make_zeros(tmp_path: Path) -> MakeZeros:
    """Makes tensors of a shape and dtype, with memory for so many elements in front."""

    def make(*shape: int, dtype: torch.dtype = torch.float16, in_front: int = 0) -> Tensor:
        num_bytes = (in_front + torch.Size(shape).numel()) * dtype.itemsize
        if DEVICE == "cuda":
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
        else:
            file = tmp_path / str(len(list(tmp_path.iterdir())))
            memory = torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)
        return memory.view(dtype)[in_front:].view(shape)

    return make


@pytest.fixture(params=[torch.float16, FP8_DTYPE], ids=str)
def make_cache(request: pytest.FixtureRequest, make_zeros: MakeZeros) -> MakeCache:
    """Makes caches of a dtype, all zeros."""
    return functools.partial(make_zeros, NUM_PAGES, *PAGE_SHAPE, dtype=request.param)


@pytest.fixture
def spread(make_zeros: MakeZeros) -> Callable[[Tensor], Tensor]:
    """Copies rows to where the last of them begins at 2^31 elements."""

    def copy(rows: Tensor) -> Tensor:
        memory = make_zeros((NUM_ROWS - 1) * ROW_STRIDE + rows.shape[1], dtype=rows.dtype, in_front=2**31)
        return memory.as_strided(rows.shape, (ROW_STRIDE, 1)).copy_(rows)

    return copy


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


Spread = Callable[[Tensor], Tensor]


def random_rows(num_columns: int) -> Tensor:
    return (torch.randn(NUM_ROWS, num_columns) * 3).to(device=DEVICE, dtype=torch.float16)


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, {}, {"min_p": 0.01}, {"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_draws_and_logprobs_read_the_right_row(spread: Spread, setting: dict[str, float]) -> None:
    near, rows = random_rows(300), make_rows([{**setting, "seed": seed} for seed in range(NUM_ROWS)])
    far = spread(near)
    token_ids = launch_sample(near, rows).token_ids_S
    assert torch.equal(launch_sample(far, rows).token_ids_S, token_ids)
    for found, wanted in zip(
        launch_token_logprobs(far, token_ids, 4), launch_token_logprobs(near, token_ids, 4), strict=True
    ):
        assert torch.equal(found, wanted)


def test_bias_and_penalties_change_the_right_row(spread: Spread) -> None:
    near = random_rows(300)
    far = spread(near)
    ones_R = torch.ones(NUM_ROWS, device=DEVICE)
    penalties = Penalties(
        rows_R=ids(*range(NUM_ROWS)), token_ids_RL=ids(7, 7, 9).repeat(NUM_ROWS, 1), num_prompt_tokens_R=ids(1, 1, 1),
        num_tokens_R=ids(3, 3, 3), repetition_R=ones_R * 2, presence_R=ones_R, frequency_R=ones_R,
    )  # fmt: skip
    for logits in (near, far):
        launch_add_bias(
            logits, token_ids_SN=ids(5, 6, 7).int()[:, None], values_SN=ones_R[:, None], position_S=ids(0, 0, 0),
            stop_ids_SN=ids(1, 2, 3).int()[:, None], min_length_S=ids(1, 1, 1),
        )  # fmt: skip
        launch_penalise(logits, penalties)
    assert torch.equal(far, near)


def test_rows_of_a_table_come_from_the_right_place(spread: Spread) -> None:
    near, out, token_ids = random_rows(96), random_rows(96), ids(2, 0, 1)
    far_out = spread(out)
    launch_embed(token_ids, spread(near), 2.0, far_out)
    assert torch.equal(far_out, launch_embed(token_ids, near, 2.0, out))


@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("programs", [None, 1])
def test_norms_read_and_add_to_the_right_row(spread: Spread, is_gemma: bool, programs: int | None) -> None:
    x, residual, weight = random_rows(96), random_rows(96), random_rows(96)[0]
    far, far_residual = spread(x), spread(residual)
    options = {"is_gemma": is_gemma, "programs_per_multiprocessor": programs}
    assert torch.equal(launch_rms_norm(far, weight, 1e-5, **options), launch_rms_norm(x, weight, 1e-5, **options))
    expected = launch_add_rms_norm(x, residual, weight, 1e-5, **options)
    assert torch.equal(launch_add_rms_norm(far, far_residual, weight, 1e-5, **options), expected)
    assert torch.equal(far_residual, residual)


@pytest.mark.parametrize("is_gelu", [False, True])
def test_gates_read_and_write_the_right_row(spread: Spread, is_gelu: bool) -> None:
    near, far_out = random_rows(192), spread(random_rows(96))
    launch_gated_product(spread(near), is_gelu=is_gelu, out=far_out)
    assert torch.equal(far_out, launch_gated_product(near, is_gelu=is_gelu))


@pytest.mark.parametrize("is_decode", [True, False])
def test_weights_are_those_of_the_right_expert(make_zeros: MakeZeros, is_decode: bool) -> None:
    hidden, inner, last = 2048, 1024, 1024  # its gate begins at 2^32 elements, which would be expert 0's
    gate_up = make_zeros(last + 1, 2 * inner, hidden)
    down = make_zeros(last + 1, hidden, inner, in_front=2**31)
    for weights in (gate_up, down):
        weights[last].copy_(torch.randn(weights.shape[1:]) * weights.shape[2] ** -0.5)
    x, routes = random_rows(hidden)[:1], torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(1, 1, device=DEVICE)
    alone = launch_moe(x, gate_up[last:], down[last:], routes, ones, is_decode=is_decode)
    assert alone.any()
    assert torch.equal(launch_moe(x, gate_up, down, routes + last, ones, is_decode=is_decode), alone)
