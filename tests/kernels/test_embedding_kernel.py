"""Embedded rows, in torch and in Triton, against plain indexing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels.embedding import embed

from .tolerances import DEVICE, DTYPES, assert_near


def triton_embed(ids: Tensor, table: Tensor, *, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    pytest.importorskip("triton")
    from flashtensors.kernels.embedding_kernel import launch_embed

    out = torch.full((len(ids), table.shape[1]), torch.nan).to(table) if out is None else out
    return launch_embed(ids, table, scale, out)


IMPLEMENTATIONS = [pytest.param(triton_embed, id="triton"), pytest.param(embed, id="door")]


def make_table(num_ids: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    wide = torch.randn(num_ids, num_columns + 8)
    wide[:, -8:] = torch.nan
    return wide.to(device=DEVICE, dtype=dtype)[:, :-8]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [64, 576, 2500])
def test_rows_are_scaled_and_unknown_ids_are_zeros(
    num_columns: int, dtype: torch.dtype, ids_dtype: torch.dtype, function: Callable[..., Tensor]
) -> None:
    table = make_table(11, num_columns, dtype)
    ids = torch.tensor([10, 0, -1, 3, 3, 11], dtype=ids_dtype, device=DEVICE)
    plain, scaled = function(ids, table), function(ids, table, scale=24.0)
    live, known = [0, 1, 3, 4], [10, 0, 3, 3]
    assert torch.equal(plain[live], table[known])
    assert_near(scaled[live], table[known].double() * 24.0, "elementwise")
    assert not plain[[2, 5]].any()
    assert not scaled[[2, 5]].any()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_rows_go_where_they_are_asked_to(function: Callable[..., Tensor]) -> None:
    table, frame = make_table(5, 48, torch.float32), torch.full((2, 50), 7.0, device=DEVICE)
    out = function(torch.tensor([4, 1], device=DEVICE), table, out=frame[:, :48])
    assert torch.equal(out, table[[4, 1]])
    assert (frame[:, 48:] == 7.0).all()
    assert function(torch.tensor([], dtype=torch.int64, device=DEVICE), table).shape == (0, 48)


def test_what_does_not_fit_is_refused() -> None:
    ids, table = torch.tensor([1], device=DEVICE), make_table(3, 8, torch.float32)
    with pytest.raises(ConfigError, match="token_ids_T is"):
        embed(ids.float(), table)
    with pytest.raises(ConfigError, match="table_VE is"):
        embed(ids, table.T)
    with pytest.raises(ConfigError, match="out is"):
        embed(ids, table, out=torch.zeros(1, 9, device=DEVICE))
