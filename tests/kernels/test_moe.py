"""A mixture of experts on a CPU: the grouped products against the definition, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.moe import moe, moe_reference

from .moe_cases import make_case
from .tolerances import assert_near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_grouped_products_are_the_definition(num_rows: int, dtype: torch.dtype) -> None:
    case = make_case(num_rows, dtype=dtype, device="cpu")
    assert_near(moe(*case.operands), case.expected(), "mixture")


def test_the_definition_is_a_loop_over_rows_and_their_experts() -> None:
    x, gate_up, down, ids, weights = (
        t.double() if t.is_floating_point() else t for t in make_case(5, device="cpu").operands
    )
    expected = torch.zeros_like(x)
    for row in range(5):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            gate, up = (gate_up[expert] @ x[row]).chunk(2)
            expected[row] += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(moe_reference(x, gate_up, down, ids, weights), expected)


def test_a_given_output_and_strided_rows() -> None:
    case = make_case(6, device="cpu", row_stride=53)
    out = torch.full((6, case.x.shape[1]), torch.nan)
    assert moe(*case.operands, out=out) is out
    assert_near(out, case.expected(), "mixture")


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda t: t[:, :-1]),
        (0, lambda t: t.T.contiguous().T),
        (1, lambda t: t[:, 1:]),
        (1, lambda t: t.half()),
        (2, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        (2, lambda t: t[0]),
        (3, lambda t: t.long()),
        (3, lambda t: t.flatten()),
        (4, lambda t: t.double()),
        (4, lambda t: t[1:]),
    ],
)
def test_operands_that_do_not_fit_are_named(place: int, change: Any) -> None:
    operands = list(make_case(4, device="cpu").operands)
    operands[place] = change(operands[place])
    with pytest.raises(ConfigError, match=r"x is|x has|gate_up is|down is|down has|expert_ids is|weights is"):
        moe(*operands)
