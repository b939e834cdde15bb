"""Merged attention states, in torch and in Triton, against fp64 attention over all keys at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels.merge import merge_pair, merge_parts

from .tolerances import DEVICE, DTYPES, assert_near

SHAPES = [(3, 2, 64), (1, 5, 80), (2, 9, 128), (0, 2, 64)]


def triton_merge_parts(parts: Tensor, lses: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    pytest.importorskip("triton")
    from flashtensors.kernels.merge_kernel import launch_merge_parts

    out = torch.full(parts.shape[1:], torch.nan).to(parts) if out is None else out
    return out, launch_merge_parts(parts, lses, out)


def triton_merge_pair(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    pytest.importorskip("triton")
    from flashtensors.kernels.merge_kernel import launch_merge_pair

    out = torch.full_like(out_a, torch.nan) if out is None else out
    return out, launch_merge_pair(out_a, lse_a, out_b, lse_b, out)


@pytest.fixture(params=["triton", "door"])
def functions(request: pytest.FixtureRequest) -> tuple:
    return (merge_pair, merge_parts) if request.param == "door" else (triton_merge_pair, triton_merge_parts)


def attend(shape: tuple[int, ...], num_parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over each of some parts, and in fp64 over all of them."""
    scores = torch.randn(num_parts, *shape[:2], 7, dtype=torch.float64, device=DEVICE) * 4
    values = torch.randn(num_parts, *shape[:2], 7, shape[2], dtype=torch.float64, device=DEVICE)
    parts = (torch.softmax(scores, -1)[..., None] * values).sum(-2).to(dtype)
    lses = torch.logsumexp(scores, -1)
    weights = torch.softmax(lses, 0)
    return parts, lses.float(), (weights[..., None] * parts.double()).sum(0), torch.logsumexp(lses, 0)


@pytest.mark.parametrize("num_parts", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_parts_are_attention_to_all(
    functions: tuple, shape: tuple[int, ...], dtype: torch.dtype, num_parts: int
) -> None:
    parts, lses, expected, expected_lse = attend(shape, num_parts, dtype)
    out, lse = functions[1](parts, lses)
    assert_near(out, expected, "two roundings")
    assert_near(lse, expected_lse, "two roundings")
    if num_parts == 2:
        out, lse = functions[0](parts[0], lses[0], parts[1], lses[1], out=parts[1])
        assert out is parts[1] or out.data_ptr() == parts[1].data_ptr()
        assert_near(out, expected, "two roundings")
        assert_near(lse, expected_lse, "two roundings")


def test_parts_without_keys_weigh_nothing(functions: tuple) -> None:
    parts, lses, _, _ = attend((4, 2, 64), 2, torch.float32)
    lses[0, 0], lses[1, 1], lses[:, 2] = -torch.inf, -torch.inf, -torch.inf
    parts[0, 0], parts[1, 1], parts[:, 2] = torch.nan, torch.inf, torch.nan
    for out, lse in (functions[1](parts, lses), functions[0](parts[0], lses[0], parts[1], lses[1])):
        assert_near(out[0], parts[1, 0], "elementwise")
        assert_near(out[1], parts[0, 1], "elementwise")
        assert_near(lse[:2], torch.stack((lses[1, 0], lses[0, 1])), "elementwise")
        assert not out[2].any()
        assert (lse[2] == -torch.inf).all()


def test_far_apart_scores_do_not_overflow(functions: tuple) -> None:
    parts = torch.randn(2, 1, 1, 16, device=DEVICE)
    lses = torch.tensor([3e4, -3e4], device=DEVICE)[:, None, None]
    for out, lse in (functions[1](parts, lses), functions[0](parts[0], lses[0], parts[1], lses[1])):
        assert torch.equal(out, parts[0])
        assert torch.equal(lse, lses[0])


def test_strided_parts_are_read(functions: tuple) -> None:
    parts, lses, expected, _ = attend((3, 2, 64), 3, torch.float32)
    strided = parts.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    assert_near(functions[1](strided, lses.mT.contiguous().mT)[0], expected, "two roundings")


def test_what_does_not_fit_is_refused() -> None:
    parts, lses, _, _ = attend((3, 2, 64), 2, torch.float32)
    with pytest.raises(ConfigError, match="lse_NTH is"):
        merge_parts(parts, lses.double())
    with pytest.raises(ConfigError, match="out_b_THD is"):
        merge_pair(parts[0], lses[0], parts[1].half(), lses[1])
    with pytest.raises(ConfigError, match="out is"):
        merge_parts(parts, lses, out=parts)
    with pytest.raises(ConfigError, match=r"out is torch.int32 .* floats"):
        merge_parts(parts, lses, out=parts[0].int())
    with pytest.raises(ConfigError, match=r"lse_b_TH is .* on meta, but"):
        merge_pair(parts[0], lses[0], parts[1], lses[1].to("meta"))
