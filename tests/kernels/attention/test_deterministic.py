"""Results of a deterministic work: bitwise the same for a sequence, whatever else is in its batch."""

from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

from ..tolerances import DEVICE
from .cases import Case

DTYPES = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.gpu) for dtype in (torch.float16, torch.bfloat16))]
LENGTHS = [2500, 150, 40, 90, 64]
NEW_TOKENS = [1, 1, 3, 20, 35]
"""The first is split in three; the last two are long."""


def attend(case: Case, chosen, **bounds):
    """Output rows of each of the sequences in `chosen`, which make up a batch in that order."""
    begins = case.starts.tolist()
    tokens = [NEW_TOKENS[s] for s in chosen]
    rows = torch.cat([torch.arange(begins[s], begins[s + 1]) for s in chosen])
    _, heads, head_dim = case.q.shape
    work = AttentionWork(
        num_heads=heads, num_kv_heads=case.k.shape[1], head_dim=head_dim, max_seqs=len(chosen), max_tokens=len(rows),
        device=DEVICE, dtype=case.q.dtype, is_deterministic=True, max_kv_length=max(LENGTHS),
    )  # fmt: skip
    starts = torch.tensor([0, *accumulate(tokens)], dtype=torch.int32, device=DEVICE)
    work.plan(starts, case.kv_lengths[chosen].to(DEVICE), **bounds)
    inputs = [x.to(DEVICE) for x in (case.q[rows], case.k, case.v, case.tables[chosen])]
    return ragged_attention(*inputs, work, scale=0.1).cpu().split(tokens)


BATCHES = {
    "with hints": ([0], {"max_query_tokens": 1, "min_query_tokens": 1}),
    "with 4 others": ([1, 2, 0, 1, 2], {}),
    "with 4 others and hints": ([0, 1, 1, 1, 1], {"max_query_tokens": 1}),
    "with 32 others": ([1] * 20 + [0] + [2] * 12, {}),
    "with 32 others and hints": ([0] + [1, 2] * 16, {"max_query_tokens": 3, "min_query_tokens": 1}),
    "before long prompts": ([0, 3, 4], {}),
    "after long prompts": ([4, 3, 0], {"min_query_tokens": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (2, 1, 128)])
def test_a_decode_does_not_depend_on_its_batch(heads, kv_heads, head_dim, dtype):
    case = Case(LENGTHS, NEW_TOKENS, heads, kv_heads, head_dim, 64, dtype)
    (alone,) = attend(case, [0])
    differing = [
        name
        for name, (chosen, bounds) in BATCHES.items()
        if not torch.equal(attend(case, chosen, **bounds)[chosen.index(0)], alone)
    ]
    assert not differing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_sequence_depends_on_its_batch(dtype):
    case = Case(LENGTHS, NEW_TOKENS, 4, 2, 64, 16, dtype)
    every = [0, 1, 2, 3, 4]
    together, turned = attend(case, every), attend(case, every[::-1])
    for s in every:
        (alone,) = attend(case, [s], max_query_tokens=NEW_TOKENS[s], min_query_tokens=NEW_TOKENS[s])
        assert torch.equal(alone, together[s])
        assert torch.equal(alone, turned[-1 - s])
