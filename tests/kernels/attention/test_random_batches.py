"""Batches of all kinds and sizes, one after the other over one work as in an engine, against the definition in torch.

What a batch leaves behind, how programs share it out and how kernels were compiled is the device's own: of these, the
interpreter sees little.
"""

import random
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.reference import ragged_attention_reference
from flashtensors.kernels.attention.work import SHORT_TOKENS, AttentionWork

from ..tolerances import DEVICE, assert_near
from .cases import FP8

IS_GPU = DEVICE == "cuda"
NUM_BATCHES = 24 if IS_GPU else 4
NUM_SEQS = [1, 2, 5, 12, 31, 60, 130, 257] if IS_GPU else [1, 2, 5, 9]
MAX_LENGTH = 6000 if IS_GPU else 150
MAX_TOKENS = 4096 if IS_GPU else 128
NUM_PAGES = 512 if IS_GPU else 16


@dataclass(kw_only=True)
class Shape:
    """Of a model, and what its attention is like."""

    heads: int
    kv_heads: int
    head_dim: int
    page: int
    dtype: torch.dtype
    kv_dtype: torch.dtype | None = None
    work: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "fp32": Shape(heads=4, kv_heads=2, head_dim=16, page=16, dtype=FP32),
    "fp16, window": Shape(heads=3, kv_heads=1, head_dim=64, page=32, dtype=FP16, work={"sliding_window": 50}),
    "fp16, fp8 cache": Shape(heads=4, kv_heads=4, head_dim=32, page=16, dtype=FP16, kv_dtype=FP8),
    "fp32, deterministic": Shape(
        heads=2, kv_heads=2, head_dim=16, page=64, dtype=FP32, work={"is_deterministic": True}
    ),
}
GPU_SHAPES = {
    "64 dims": Shape(heads=32, kv_heads=8, head_dim=64, page=64, dtype=BF16),
    "128 dims": Shape(heads=16, kv_heads=8, head_dim=128, page=64, dtype=BF16),
    "128 dims, pages of 16": Shape(heads=8, kv_heads=1, head_dim=128, page=16, dtype=FP16),
    "128 dims, window": Shape(heads=8, kv_heads=4, head_dim=128, page=64, dtype=BF16, work={"sliding_window": 700}),
    "256 dims, soft cap": Shape(heads=4, kv_heads=2, head_dim=256, page=128, dtype=BF16, options={"softcap": 5.0}),
    "96 dims": Shape(heads=4, kv_heads=4, head_dim=96, page=32, dtype=BF16),
    "64 dims, fp8": Shape(heads=32, kv_heads=8, head_dim=64, page=64, dtype=BF16, kv_dtype=FP8),
    "128 dims, fp8": Shape(heads=16, kv_heads=8, head_dim=128, page=64, dtype=BF16, kv_dtype=FP8),
    "256 dims, fp8": Shape(heads=4, kv_heads=2, head_dim=256, page=64, dtype=BF16, kv_dtype=FP8),
}


def draw_new_tokens(draw: random.Random, kind: str, lengths: list[int]) -> list[int]:
    """How many of each sequence's tokens are new; `MAX_TOKENS` in all."""
    most = {"decode": 1, "verify": SHORT_TOKENS, "mixed": MAX_TOKENS // 2, "prompts": MAX_TOKENS // 2}[kind]
    counts, left = [], MAX_TOKENS
    for length in lengths:
        least = SHORT_TOKENS + 1 if kind == "prompts" else 1
        count = (
            draw.choice([0, 1, 1]) if kind == "mixed" and draw.random() < 0.6 else draw.randint(least, max(least, most))
        )
        counts.append(max(0, min(count, length, left)))
        left -= counts[-1]
    return counts


def draw_groups(draw: random.Random, tables: torch.Tensor, lengths: list[int], new_tokens: list[int], page: int):
    """Neighbours that are given the same first pages; None where nobody has pages to share."""
    groups, first = [], 0
    while first < len(lengths) - 1:
        count = draw.randint(2, 6)
        members = range(first, min(first + count, len(lengths)))
        prefix = min((lengths[s] - new_tokens[s]) // page * page for s in members)
        if prefix and all(0 < new_tokens[s] <= SHORT_TOKENS for s in members):
            tables[members.start : members.stop, : prefix // page] = tables[first, : prefix // page].clone()
            groups.append([first, len(members), prefix])
        first = members.stop
    return torch.tensor(groups, dtype=torch.int32, device=DEVICE) if groups else None


def check(shape: Shape) -> None:
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    kv_dtype = shape.kv_dtype or shape.dtype
    size = (NUM_PAGES, shape.kv_heads, shape.page, shape.head_dim)
    k, v = (torch.randn(size, generator=generator).to(kv_dtype).to(DEVICE) for _ in range(2))
    options = dict(shape.options)
    if shape.kv_dtype == FP8:
        options |= {
            name: torch.linspace(0.5, 1.5, shape.kv_heads, device=DEVICE) for name in ("k_scales_K", "v_scales_K")
        }
    work = AttentionWork(
        num_heads=shape.heads, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, max_seqs=max(NUM_SEQS),
        max_tokens=MAX_TOKENS, device=DEVICE, dtype=shape.dtype, kv_dtype=shape.kv_dtype, max_kv_length=MAX_LENGTH,
        max_groups=64, **shape.work,
    )  # fmt: skip
    for number in range(NUM_BATCHES):
        kind = ("decode", "verify", "mixed", "prompts")[number % 4]
        lengths = [int(MAX_LENGTH ** draw.uniform(0, 1)) for _ in range(draw.choice(NUM_SEQS))]
        new_tokens = draw_new_tokens(draw, kind, lengths)
        num_pages = -(-max(lengths) // shape.page)
        tables = torch.randint(0, NUM_PAGES, (len(lengths), num_pages), generator=generator, dtype=torch.int32)
        groups = draw_groups(draw, tables, lengths, new_tokens, shape.page) if draw.random() < 0.4 else None
        starts = torch.tensor([0, *torch.tensor(new_tokens).cumsum(0)], dtype=torch.int32, device=DEVICE)
        work.plan(
            starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), groups=groups,
            max_query_tokens={"decode": 1, "verify": SHORT_TOKENS}.get(kind) if draw.random() < 0.7 else None,
            reads_ahead=kind == "decode" and draw.random() < 0.5,
        )  # fmt: skip
        q = torch.randn(sum(new_tokens), shape.heads, shape.head_dim, generator=generator).to(shape.dtype).to(DEVICE)
        arguments = (q, k, v, tables.to(DEVICE), work)
        lse = torch.full(q.shape[:2], float("nan"), device=DEVICE)
        expected_lse = torch.full_like(lse, float("nan"))
        named = {"scale": shape.head_dim**-0.5, **options}
        out = [ragged_attention(*arguments, lse_TH=lse, **named) for _ in range(2)]
        expected = ragged_attention_reference(*arguments, lse_TH=expected_lse, **named)
        for each in out:
            assert_near(each, expected.double(), "attention")
        assert_near(lse, expected_lse.double(), "log-sum-exp")


@pytest.mark.skipif(IS_GPU, reason="these are for the interpreter")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equal_the_definition_in_the_interpreter(shape: Shape) -> None:
    check(shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=GPU_SHAPES.keys())
def test_equal_the_definition(shape: Shape) -> None:
    check(shape)
