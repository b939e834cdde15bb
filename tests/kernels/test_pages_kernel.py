"""Pages and tokens that move, in torch and in Triton, against Python loops over plain copies."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtensors.errors import ConfigError
from flashtensors.kernels import pages
from flashtensors.kernels.pages import CacheSet, make_cache_set

from .tolerances import DEVICE, DTYPES

FP8 = torch.float8_e4m3fn
ALL_DTYPES = [*DTYPES, FP8]
SHAPES = [(6, 2, 4, 64), (5, 3, 2, 24), (9, 1, 16, 80)]


@pytest.fixture(params=["triton", "door"])
def moves(request: pytest.FixtureRequest) -> Any:
    """Triton's launches, and the doors, under the same names."""
    if request.param == "door":
        return pages
    pytest.importorskip("triton")
    from flashtensors.kernels import pages_kernel as kernel

    def gather_pages(cache_set: CacheSet, pages_N: Tensor, out: Tensor) -> Tensor:
        kernel.launch_gather_pages(cache_set, pages_N, out)
        return out

    def gather_tokens(cache: Tensor, slots_L: Tensor, out: Tensor) -> Tensor:
        kernel.launch_move_tokens(cache, slots_L, out, is_scatter=False)
        return out

    return SimpleNamespace(
        copy_pages=kernel.launch_copy_pages,
        gather_pages=gather_pages,
        scatter_pages=kernel.launch_scatter_pages,
        gather_tokens=gather_tokens,
        scatter_tokens=lambda tokens, cache, slots: kernel.launch_move_tokens(cache, slots, tokens, is_scatter=True),
    )


def make_caches(shape: tuple[int, ...], dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    """Caches with a page of room between pages, so that strides matter."""
    wide = [(torch.randn(shape[0], 2, *shape[1:]) * 8).to(device=DEVICE, dtype=dtype) for _ in range(count)]
    return [cache[:, 0] for cache in wide]


def as_bytes(caches: list[Tensor]) -> list[Tensor]:
    return [cache.contiguous().view(torch.uint8).clone() for cache in caches]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_are_copied_in_every_cache(moves: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    caches = make_caches(shape, dtype)
    expected = as_bytes(caches)
    for cache in expected:
        cache[4], cache[0] = cache[1].clone(), cache[3].clone()
    moves.copy_pages(make_cache_set(caches), ids(1, -1, 3, 2), ids(4, 2, 0, -1))
    assert all(torch.equal(a, b) for a, b in zip(as_bytes(caches), expected, strict=True))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_pages_come_back_elsewhere(moves: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    caches = make_caches(shape, dtype)
    cache_set, before = make_cache_set(caches), as_bytes(caches)
    gathered = torch.zeros(3, len(caches), *shape[1:], device=DEVICE).to(dtype)
    assert moves.gather_pages(cache_set, ids(4, -1, 0), gathered) is gathered
    raw = gathered.view(torch.uint8)
    for index, cache in enumerate(before):
        assert torch.equal(raw[0, index], cache[4])
        assert torch.equal(raw[2, index], cache[0])
    assert not raw[1].any()
    moves.scatter_pages(gathered, cache_set, ids(1, 2, -1))
    for index, (cache, old) in enumerate(zip(as_bytes(caches), before, strict=True)):
        assert torch.equal(cache[1], old[4])
        assert torch.equal(cache[2], raw[1, index])
        assert torch.equal(cache[0], old[0])
        assert torch.equal(cache[3:], old[3:])


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_are_gathered_and_scattered_by_slot(moves: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    cache = make_caches(shape, dtype, count=1)[0]
    (before,), page_size, slots = as_bytes([cache]), shape[2], [9, -1, 0, 7]
    tokens = torch.zeros(4, shape[1], shape[3], device=DEVICE).to(dtype)
    moves.gather_tokens(cache, ids(*slots), tokens)
    for row, slot in zip(tokens.view(torch.uint8), slots, strict=True):
        assert torch.equal(row, before[slot // page_size, :, slot % page_size] if slot >= 0 else torch.zeros_like(row))
    slots = [3, 8, 1, -1]
    moves.scatter_tokens(tokens, cache, ids(*slots))
    for row, slot in zip(tokens.view(torch.uint8), slots, strict=True):
        before[slot // page_size, :, slot % page_size] = row if slot >= 0 else before[-1, :, -1]
    assert torch.equal(as_bytes([cache])[0], before)


def test_no_pages_are_no_work(moves: Any) -> None:
    caches = make_caches(SHAPES[0], torch.float32)
    cache_set, before = make_cache_set(caches), as_bytes(caches)
    moves.copy_pages(cache_set, ids(), ids())
    moves.scatter_pages(torch.empty(0, 3, 2, 4, 64, device=DEVICE), cache_set, ids())
    moves.scatter_tokens(torch.empty(0, 2, 64, device=DEVICE), caches[0], ids())
    assert all(torch.equal(a, b) for a, b in zip(as_bytes(caches), before, strict=True))


def test_doors_make_what_they_return() -> None:
    caches = make_caches(SHAPES[0], torch.float16)
    gathered = pages.gather_pages(make_cache_set(caches), ids(5, 2))
    assert torch.equal(gathered[:, 1], caches[1][[5, 2]])
    assert torch.equal(pages.gather_tokens(caches[2], ids(6))[0], caches[2][1, :, 2])


@pytest.mark.parametrize(
    ("caches", "message"),
    [
        ([], "at least one"),
        ([torch.zeros(2, 1, 4, 8), torch.zeros(3, 1, 4, 8)], "cache 1 is"),
        ([torch.zeros(2, 1, 4, 8).transpose(2, 3)], "contiguous"),
        ([torch.zeros(2, 1, 1, 2)], "multiples of 16"),
        ([torch.zeros(65)[1:].view(2, 1, 4, 8)], "start at a multiple"),
    ],
)
def test_caches_that_do_not_fit_are_refused(caches: list[Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_cache_set([cache.to(DEVICE) if "start" not in message else cache for cache in caches])


def test_what_does_not_fit_is_refused() -> None:
    caches = make_caches(SHAPES[0], torch.float32)
    cache_set = make_cache_set(caches)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("indices are", lambda: pages.copy_pages(cache_set, ids(1, 2), ids(1))),
        ("indices are", lambda: pages.gather_pages(cache_set, ids(1).int())),
        ("not contiguous", lambda: pages.gather_pages(cache_set, ids(1, 2, 3, 4)[::2])),
        ("pages are", lambda: pages.scatter_pages(torch.zeros(1, 2, 2, 4, 64, device=DEVICE), cache_set, ids(1))),
        ("pages must", lambda: pages.gather_pages(cache_set, ids(1), torch.zeros(1, 3, 2, 64, 4, device=DEVICE).mT)),
        ("tokens are", lambda: pages.scatter_tokens(torch.zeros(1, 2, 32, device=DEVICE), caches[0], ids(1))),
        ("cache is", lambda: pages.gather_tokens(torch.zeros(4, 16, 8, device=DEVICE), ids(1))),
        ("cache is", lambda: pages.gather_tokens(torch.zeros(4, 2, 16, 8, device=DEVICE).mT, ids(1))),
        ("cache is", lambda: pages.scatter_tokens(torch.zeros(1, 2, 8), torch.zeros(4, 16, 8, device=DEVICE), ids(1))),
        ("last must be 1", lambda: pages.scatter_tokens(torch.zeros(1, 64, 2, device=DEVICE).mT, caches[0], ids(1))),
    ]
    for message, call in refused:
        with pytest.raises(ConfigError, match=message):
            call()
