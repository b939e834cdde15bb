"""Routing against what DeepSeek's and Qwen's models define, and in Triton against the definition in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels.moe_routing import Routing, route, route_reference

from .tolerances import DEVICE

ROUTINGS = {
    "softmax": Routing(num_experts_per_token=3, renormalise=False),
    "renormalised": Routing(num_experts_per_token=4),
    "one": Routing(num_experts_per_token=1),
    "sigmoid": Routing(num_experts_per_token=2, is_sigmoid=True, scale=2.5),
    "deepseek_v2": Routing(num_experts_per_token=3, renormalise=False, scale=16.0, num_groups=4, num_groups_kept=2),
    "deepseek_v3": Routing(
        num_experts_per_token=4,
        is_sigmoid=True,
        scale=2.5,
        num_groups=6,
        num_groups_kept=3,
        experts_per_group_score=2,
    ),
}
every_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())


def random_logits(num_rows: int, num_experts: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_experts, generator=torch.Generator().manual_seed(seed)) * 2


def by_sorting(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[list[list[int]], list[list[float]]]:
    """Expert by expert, in plain Python numbers."""
    all_ids, all_weights = [], []
    for row in logits.double():
        scores = (torch.sigmoid(row) if routing.is_sigmoid else torch.softmax(row, 0)).tolist()
        choice = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        size = len(choice) // routing.num_groups

        def group_score(group: int, choice: list[float] = choice, size: int = size) -> float:
            return sum(sorted(choice[group * size : (group + 1) * size])[-routing.experts_per_group_score :])

        kept = sorted(range(routing.num_groups), key=group_score)[-routing.num_groups_kept :]
        allowed = [expert for expert in range(len(choice)) if expert // size in kept]
        ids = sorted(allowed, key=lambda expert: -choice[expert])[: routing.num_experts_per_token]
        total = sum(scores[expert] for expert in ids) if routing.renormalise else 1.0
        all_ids.append(ids)
        all_weights.append([scores[expert] / total * routing.scale for expert in ids])
    return all_ids, all_weights


@pytest.mark.parametrize("has_bias", [False, True])
@every_routing
def test_the_definition_is_that_of_the_models(routing: Routing, has_bias: bool) -> None:
    logits, bias = random_logits(30, 12), random_logits(1, 12, seed=1)[0] * 0.1 if has_bias else None
    ids, weights = route_reference(logits, routing, bias_X=bias)
    expected_ids, expected_weights = by_sorting(logits, routing, bias)
    assert ids.tolist() == expected_ids
    torch.testing.assert_close(weights, torch.tensor(expected_weights))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_rows", "num_experts"), [(0, 24), (1, 12), (5, 24), (3, 132), (2, 492)])
@every_routing
def test_one_pass_in_triton(routing: Routing, num_rows: int, num_experts: int, has_bias: bool) -> None:
    pytest.importorskip("triton")
    from flashtensors.kernels.moe_routing_kernel import launch_route

    logits = random_logits(num_rows, num_experts).to(DEVICE)
    bias = random_logits(1, num_experts, seed=1)[0].to(DEVICE) * 0.1 if has_bias else None
    ids, weights = launch_route(logits, routing, bias)
    expected_ids, expected_weights = route_reference(logits, routing, bias_X=bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7)


@every_routing
def test_equal_and_hostile_logits_in_triton(routing: Routing) -> None:
    pytest.importorskip("triton")
    from flashtensors.kernels.moe_routing_kernel import launch_route

    logits = random_logits(6, 24)
    logits[0] = 1.0
    logits[1, 3] = torch.nan
    logits[2] = torch.nan
    logits[3, 5] = -torch.inf
    logits[4] = logits[4].round()
    ids, weights = launch_route(logits.half().to(DEVICE), routing)
    expected_ids, expected_weights = route_reference(logits.half().to(DEVICE), routing)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=1e-7, equal_nan=True)
    assert all(len(set(row)) == len(row) and min(row) >= 0 and max(row) < 24 for row in ids.tolist())


def test_strided_logits_in_triton() -> None:
    pytest.importorskip("triton")
    from flashtensors.kernels.moe_routing_kernel import launch_route

    logits = random_logits(9, 20).to(DEVICE)
    for strided in (logits[:, 4:], logits[:, 4:].T.contiguous().T):
        ids, weights = launch_route(strided, ROUTINGS["renormalised"])
        expected_ids, expected_weights = route_reference(logits[:, 4:], ROUTINGS["renormalised"])
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize(
    "routing",
    [
        Routing(num_experts_per_token=13),
        Routing(num_experts_per_token=0),
        Routing(num_experts_per_token=2, num_groups=5),
        Routing(num_experts_per_token=2, num_groups=2, num_groups_kept=3),
        Routing(num_experts_per_token=7, num_groups=2),
        Routing(num_experts_per_token=1, num_groups=2, experts_per_group_score=3),
        Routing(num_experts_per_token=1, num_groups=12, experts_per_group_score=2),
    ],
)
def test_what_cannot_be_routed_is_refused(routing: Routing) -> None:
    with pytest.raises(ConfigError, match=r"routing|a group of"):
        route(torch.zeros(2, 12), routing)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[T, X\]"):
        route(torch.zeros(12), ROUTINGS["one"])


@pytest.mark.parametrize(
    "bias", [torch.zeros(11), torch.zeros(24)[::2], torch.zeros(12).double(), torch.zeros(12, device="meta")]
)
def test_a_bias_that_kernels_cannot_read_is_refused(bias: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^bias_X is .* must be contiguous torch.float32 \[12\] on cpu") as refused:
        route(torch.zeros(2, 12), ROUTINGS["one"], bias_X=bias)
    assert refused.value.param == "bias_X"


@pytest.mark.parametrize("experts_per_group_score", [1, 2])
def test_a_masked_expert_of_a_kept_group_comes_before_any_of_the_others(experts_per_group_score: int) -> None:
    routing = Routing(
        num_experts_per_token=2, is_sigmoid=True, num_groups=4, num_groups_kept=1,
        experts_per_group_score=experts_per_group_score,
    )  # fmt: skip
    bias = torch.full((8,), -torch.inf)
    bias[5] = 0.0
    expected = [[5, 4]] if experts_per_group_score == 1 else [[0, 1]]  # else every group scores -inf
    assert route_reference(torch.zeros(1, 8), routing, bias_X=bias)[0].tolist() == expected
    pytest.importorskip("triton")
    from flashtensors.kernels.moe_routing_kernel import launch_route

    assert launch_route(torch.zeros(1, 8, device=DEVICE), routing, bias.to(DEVICE))[0].tolist() == expected
