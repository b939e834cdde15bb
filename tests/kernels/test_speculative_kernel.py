"""The kernels that verify drafts against their references, and, compiled, against the target's distribution."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.kernels.sampling_rows import SamplingRows
from flashtensors.kernels.speculative import verify_chain_reference, walk_drafts_reference
from flashtensors.kernels.speculative_kernel import launch_verify_chain, launch_walk_drafts

from .sampling_oracle import SETTINGS, assert_draws_fit, make_rows, probabilities
from .tolerances import DEVICE, DTYPES


def to_host(rows: SamplingRows) -> SamplingRows:
    return SamplingRows(**{name: getattr(rows, name).cpu() for name in SamplingRows.__dataclass_fields__})


@pytest.mark.parametrize("num_nodes", [1, 5, 16])
@pytest.mark.parametrize("is_tree", [False, True])
def test_walks_are_those_of_the_reference(num_nodes: int, is_tree: bool) -> None:
    generator = torch.Generator().manual_seed(num_nodes)
    shape = (30, num_nodes)
    sampled = torch.randint(0, 2, shape, generator=generator)
    draft = torch.randint(-1, 2, shape, generator=generator)
    parents = None
    if is_tree:
        parents = torch.stack([torch.randint(0, max(n, 1), (30,), generator=generator) for n in range(num_nodes)], 1)
        parents = parents.int()
    expected = walk_drafts_reference(sampled, draft, parents)
    actual = launch_walk_drafts(sampled.to(DEVICE), draft.to(DEVICE), None if parents is None else parents.to(DEVICE))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_chains_are_those_of_the_reference(num_drafts: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_drafts)
    vocab_size, num_rows, num_nodes = 200, len(SETTINGS), num_drafts + 1
    logits = (torch.randn(num_rows, num_nodes, vocab_size, generator=generator) * 2).to(dtype)
    noise = torch.randn(num_rows, num_drafts, vocab_size, generator=generator)
    draft_probs = torch.softmax(logits[:, :num_drafts].float() + noise * 0.5, -1)
    draft = torch.zeros(num_rows, num_drafts, dtype=torch.int64)
    for row in range(num_rows if num_drafts else 0):
        draft[row] = draft_probs[row].multinomial(1, generator=generator)[:, 0]
    if num_drafts > 1:
        draft[3, 1] = -1
        logits[4, 1, 7] = torch.nan
        draft[4, 0] = logits[4, 0].argmax()
    rows = make_rows(
        [{**setting, "seed": row, "position": n} for row, setting in enumerate(SETTINGS) for n in range(num_nodes)]
    )
    expected = verify_chain_reference(logits, draft, draft_probs, to_host(rows))
    actual = launch_verify_chain(logits.to(DEVICE), draft.to(DEVICE), draft_probs.to(DEVICE), rows, tile=256)
    assert torch.equal(actual.num_accepted_S.cpu(), expected.num_accepted_S)
    assert torch.equal(actual.is_valid_S.cpu(), expected.is_valid_S)
    assert torch.equal(actual.next_token_S.cpu(), expected.next_token_S)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_first_tokens_have_the_targets_distribution(setting: dict) -> None:
    num_rows, vocab_size = 20_000, 300
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 2, vocab_size, generator=generator).expand(num_rows, -1, -1).contiguous()
    draft_probs = torch.softmax(torch.randn(1, 1, vocab_size, generator=generator), -1)
    draft = draft_probs[0, 0].multinomial(num_rows, True, generator=generator)[:, None]
    rows = make_rows([{**setting, "seed": row, "position": n} for row in range(num_rows) for n in range(2)])
    verified = launch_verify_chain(
        logits.to(DEVICE), draft.to(DEVICE), draft_probs.expand(num_rows, -1, -1).contiguous().to(DEVICE), rows
    )
    first = torch.where(verified.num_accepted_S.cpu() > 0, draft[:, 0], verified.next_token_S.cpu())
    assert_draws_fit(first.numpy(), probabilities(logits[0, 0], setting))
