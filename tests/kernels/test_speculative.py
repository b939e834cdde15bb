"""Verifying drafts: hand-made trees, and chi-square of what comes out against the target's own distribution."""

from __future__ import annotations

import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.sampling_rows import SamplingRows, token_probabilities
from flashtensors.kernels.speculative import verify_chain, walk_drafts

from .test_sampling import chi_square_bound, oracle_probabilities

VOCAB = 9
KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"top_k": 4},
    {"top_k": 6, "top_p": 0.8, "temperature": 1.5},
    {"min_p": 0.2},
]


def make_rows(num_rows: int, num_nodes: int, kind: dict) -> SamplingRows:
    """Row s draws with seed s, node n at position 10 + n."""
    count = num_rows * num_nodes
    return SamplingRows(
        temperature_S=torch.full((count,), kind.get("temperature", 1.0)),
        top_k_S=torch.full((count,), kind.get("top_k", 0)),
        top_p_S=torch.full((count,), kind.get("top_p", 1.0), dtype=torch.float64),
        min_p_S=torch.full((count,), kind.get("min_p", 0.0)),
        seed_S=torch.arange(num_rows).repeat_interleave(num_nodes),
        position_S=10 + torch.arange(num_nodes).repeat(num_rows),
    )


def test_a_chain_is_followed_to_its_first_mistake() -> None:
    sampled = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    draft = torch.tensor([[0, 5, 6, 7], [0, 5, 9, 7], [0, 4, 6, 7], [5, 5, -1, 7]])
    num_accepted, next_token, path = walk_drafts(sampled, draft)
    assert num_accepted.tolist() == [3, 1, 0, 1]
    assert next_token.tolist() == [8, 6, 5, 6]
    assert path.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [0, -1, -1, -1], [0, 1, -1, -1]]


def test_a_tree_is_followed_down_one_branch() -> None:
    #        0
    #      / | \
    #  1:5  2:6  3:6      siblings with one token: the first
    #       |    |
    #      4:7   5:8
    parents = torch.tensor([[-1, 0, 0, 0, 2, 3]], dtype=torch.int32)
    draft = torch.tensor([[0, 5, 6, 6, 7, 8]])
    for sampled, accepted, following, nodes in (
        ([6, 0, 7, 0, 9, 0], 2, 9, [0, 2, 4]),
        ([6, 0, 8, 0, 9, 0], 1, 8, [0, 2]),
        ([5, 1, 0, 0, 0, 0], 1, 1, [0, 1]),
        ([3, 0, 0, 0, 0, 0], 0, 3, [0]),
    ):
        num_accepted, next_token, path = walk_drafts(torch.tensor([sampled]), draft, parents)
        assert (num_accepted.item(), next_token.item()) == (accepted, following)
        assert path[0].tolist() == nodes + [-1] * (6 - len(nodes))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_probabilities_are_the_definition(kind: dict) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2)) * 2
    setting = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **kind}
    if kind.get("temperature") == 0:
        setting.update(temperature=1.0, top_k=1)
    expected = torch.from_numpy(oracle_probabilities(logits[0].numpy(), **setting))
    torch.testing.assert_close(token_probabilities(logits, make_rows(1, 1, kind))[0], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tokens_that_come_out_have_the_targets_distribution(kind: dict) -> None:
    """The first token, whether accepted or redrawn, and the second after an accepted first."""
    num_rows = 20_000
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(1, 3, VOCAB, generator=generator) * 1.5).expand(num_rows, -1, -1).contiguous()
    draft_probs = torch.softmax(torch.randn(1, 2, VOCAB, generator=generator), -1)
    draft = torch.stack([draft_probs[0, d].multinomial(num_rows, True, generator=generator) for d in range(2)], 1)
    rows = make_rows(num_rows, 3, kind)
    verified = verify_chain(logits, draft, draft_probs.expand(num_rows, -1, -1).contiguous(), rows)
    target = token_probabilities(logits[0], make_rows(1, 3, kind))
    assert verified.is_valid_S.all()
    out = torch.cat((draft, torch.zeros(num_rows, 1, dtype=torch.int64)), 1)
    accepted = verified.num_accepted_S.long()
    out[torch.arange(num_rows), accepted] = verified.next_token_S
    for depth in range(3):
        reached = out[accepted >= depth, depth]
        if len(reached):
            counts = torch.bincount(reached, minlength=VOCAB).double()
            wanted = target[depth] * len(reached)
            assert not counts[wanted == 0].any()
            is_possible = wanted > 0
            statistic = ((counts - wanted)[is_possible] ** 2 / wanted[is_possible]).sum()
            degrees = int(is_possible.sum()) - 1
            assert statistic <= (chi_square_bound(degrees) if degrees else 0.0)
    # min(p, q) summed is the published rate of acceptance.
    rate = torch.minimum(target[0], draft_probs[0, 0].double()).sum()
    assert abs((accepted > 0).double().mean() - rate) < 0.02


def test_a_chain_ends_at_its_last_draft_and_at_bad_logits() -> None:
    logits = torch.zeros(4, 3, VOCAB)
    logits[..., 4] = 50.0
    logits[1, 1, 0] = logits[2, 2, 0] = torch.nan
    probs = torch.full((4, 2, VOCAB), 1 / VOCAB)
    draft = torch.tensor([[4, -1], [4, 4], [4, 4], [1, 4]])
    verified = verify_chain(logits, draft, probs, make_rows(4, 3, {}))
    assert verified.num_accepted_S.tolist() == [1, 1, 2, 0]
    assert verified.is_valid_S.tolist() == [True, False, False, True]
    assert verified.next_token_S.tolist() == [4, 0, 0, 4]


def test_without_rows_or_drafts() -> None:
    verified = verify_chain(
        torch.zeros(2, 1, VOCAB), torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, VOCAB), make_rows(2, 1, {})
    )
    assert verified.num_accepted_S.tolist() == [0, 0]
    empty = torch.empty(0, 2, dtype=torch.int64)
    none = verify_chain(torch.zeros(0, 3, VOCAB), empty, torch.empty(0, 2, VOCAB), make_rows(0, 3, {}))
    assert none.next_token_S.shape == (0,)
    assert walk_drafts(empty, empty)[2].shape == (0, 2)


def test_what_does_not_fit_is_refused() -> None:
    logits, draft, probs = torch.zeros(2, 3, VOCAB), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, VOCAB)
    with pytest.raises(ConfigError, match="logits_SNV is"):
        verify_chain(logits[:, :2], draft, probs, make_rows(2, 3, {}))
    with pytest.raises(ConfigError, match="draft_probs_SDV is"):
        verify_chain(logits, draft, probs.double(), make_rows(2, 3, {}))
    with pytest.raises(ConfigError, match=r"logits are torch.float64"):
        verify_chain(logits.double(), draft, probs, make_rows(2, 3, {}))
    with pytest.raises(ConfigError, match="temperature_S is"):
        verify_chain(logits, draft, probs, make_rows(2, 2, {}))
    with pytest.raises(ConfigError, match="draft_SN is"):
        walk_drafts(draft, draft[:1])
    with pytest.raises(ConfigError, match="with the root"):
        walk_drafts(draft[:, :0], draft[:, :0])
