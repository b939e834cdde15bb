"""Copy, gather and scatter pages of all caches at once, and tokens of one cache.

Pages move whole: a gathered page is the bytes of every layer's keys and values side by side, so it can leave for the
host in one copy and come back in one. Tokens move by slot (page * page_size + offset). Indices are on the device of the
caches; one below 0 is padding, and nothing is read or written for it.

Shapes: C caches (keys and values of all layers), N pages that move, L tokens, K key-value heads, P page size, D head
dim; a cache is `[num_pages, K, P, D]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .arguments import check_cache

ALIGNMENT = 16
"""Bytes by which pages must be aligned: one access of one thread."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheSet:
    """Caches that one launch reads and writes; made by `make_cache_set`, once for the life of the caches."""

    caches: tuple[Tensor, ...]
    """All alike; kept alive by this object."""
    addresses_C: Tensor
    """int64: where each begins, on their device."""

    @property
    def page_shape(self) -> tuple[int, ...]:
        """`(C, K, P, D)`."""
        return (len(self.caches), *self.caches[0].shape[1:])


def make_cache_set(caches: Sequence[Tensor]) -> CacheSet:
    """Note where `caches` lie; copies their addresses to the device, so not inside a CUDA graph.

    Raises:
        ConfigError: No caches, or caches that differ in shape, dtype, stride or device, or whose pages are not
            contiguous multiples of 16 bytes.
    """
    if not caches:
        raise ConfigError("a cache set needs at least one cache")
    first = caches[0]
    for index, cache in enumerate(caches):
        alike = (cache.shape, cache.stride(), cache.dtype, cache.device)
        if alike != (first.shape, first.stride(), first.dtype, first.device):
            raise ConfigError(
                f"cache {index} is {cache.dtype} {list(cache.shape)} with strides {cache.stride()} on {cache.device}, "
                f"but cache 0 is {first.dtype} {list(first.shape)} with strides {first.stride()} on {first.device}"
            )
        if cache.dim() != 4 or cache.data_ptr() % ALIGNMENT:
            raise ConfigError(
                f"cache {index} must be [num_pages, K, P, D] and start at a multiple of {ALIGNMENT} bytes"
            )
    page_bytes, stride_bytes = first[:1].numel() * first.itemsize, first.stride(0) * first.itemsize
    if not first[:1].is_contiguous() or page_bytes % ALIGNMENT or stride_bytes % ALIGNMENT:
        raise ConfigError(
            f"pages of {list(first.shape[1:])} {first.dtype} with strides {first.stride()} must be contiguous, and "
            f"their {page_bytes} bytes, and the {stride_bytes} between them, multiples of {ALIGNMENT}"
        )
    addresses_C = torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.int64, device=first.device)
    return CacheSet(caches=tuple(caches), addresses_C=addresses_C)


def copy_pages(cache_set: CacheSet, source_pages_N: Tensor, target_pages_N: Tensor) -> None:
    """Copy pages to pages in every cache; int64. No page may be the target of two, or a target and a source."""
    _check_indices(cache_set.caches[0], source_pages_N, target_pages_N)
    if cache_set.addresses_C.is_cuda:
        from .pages_kernel import launch_copy_pages

        return launch_copy_pages(cache_set, source_pages_N, target_pages_N)
    return copy_pages_reference(cache_set, source_pages_N, target_pages_N)


def gather_pages(cache_set: CacheSet, pages_N: Tensor, out: Tensor | None = None) -> Tensor:
    """Pages of every cache, `[N, C, K, P, D]`; `out` is contiguous, None: a new tensor (padding pages undefined)."""
    out = _checked_buffer(cache_set, pages_N, out)
    if cache_set.addresses_C.is_cuda:
        from .pages_kernel import launch_gather_pages

        launch_gather_pages(cache_set, pages_N, out)
    else:
        gather_pages_reference(cache_set, pages_N, out)
    return out


def scatter_pages(pages_NCKPD: Tensor, cache_set: CacheSet, pages_N: Tensor) -> None:
    """Write what `gather_pages` gave to pages of every cache."""
    _checked_buffer(cache_set, pages_N, pages_NCKPD)
    if cache_set.addresses_C.is_cuda:
        from .pages_kernel import launch_scatter_pages

        return launch_scatter_pages(pages_NCKPD, cache_set, pages_N)
    return scatter_pages_reference(pages_NCKPD, cache_set, pages_N)


def gather_tokens(cache: Tensor, slots_L: Tensor, out: Tensor | None = None) -> Tensor:
    """Keys or values at `slots_L` of one cache, `[L, K, D]`; `out` has any strides but a last one of 1."""
    check_cache("cache", cache)
    if out is None:
        out = torch.empty((slots_L.numel(), cache.shape[1], cache.shape[3]), dtype=cache.dtype, device=cache.device)
    _check_tokens(cache, slots_L, out)
    if cache.is_cuda:
        from .pages_kernel import launch_move_tokens

        launch_move_tokens(cache, slots_L, out, is_scatter=False)
    else:
        gather_tokens_reference(cache, slots_L, out)
    return out


def scatter_tokens(tokens_LKD: Tensor, cache: Tensor, slots_L: Tensor) -> None:
    """Write `tokens_LKD` to `slots_L` of one cache; last stride 1."""
    check_cache("cache", cache)
    _check_tokens(cache, slots_L, tokens_LKD)
    if cache.is_cuda:
        from .pages_kernel import launch_move_tokens

        return launch_move_tokens(cache, slots_L, tokens_LKD, is_scatter=True)
    return scatter_tokens_reference(tokens_LKD, cache, slots_L)


def copy_pages_reference(cache_set: CacheSet, source_pages_N: Tensor, target_pages_N: Tensor) -> None:
    """`copy_pages` in torch."""
    is_live = (source_pages_N >= 0) & (target_pages_N >= 0)
    for cache in map(_as_bytes, cache_set.caches):
        cache[target_pages_N[is_live]] = cache[source_pages_N[is_live]]


def gather_pages_reference(cache_set: CacheSet, pages_N: Tensor, out: Tensor) -> None:
    """`gather_pages` in torch."""
    is_live = pages_N >= 0
    for index, cache in enumerate(cache_set.caches):
        _as_bytes(out)[is_live, index] = _as_bytes(cache)[pages_N[is_live]]


def scatter_pages_reference(pages_NCKPD: Tensor, cache_set: CacheSet, pages_N: Tensor) -> None:
    """`scatter_pages` in torch."""
    is_live = pages_N >= 0
    for index, cache in enumerate(cache_set.caches):
        _as_bytes(cache)[pages_N[is_live]] = _as_bytes(pages_NCKPD)[is_live, index]


def gather_tokens_reference(cache: Tensor, slots_L: Tensor, out: Tensor) -> None:
    """`gather_tokens` in torch."""
    is_live, page_size = slots_L >= 0, cache.shape[2]
    slots = slots_L[is_live]
    _as_bytes(out)[is_live] = _as_bytes(cache)[slots // page_size, :, slots % page_size]


def scatter_tokens_reference(tokens_LKD: Tensor, cache: Tensor, slots_L: Tensor) -> None:
    """`scatter_tokens` in torch."""
    is_live, page_size = slots_L >= 0, cache.shape[2]
    slots = slots_L[is_live]
    _as_bytes(cache)[slots // page_size, :, slots % page_size] = _as_bytes(tokens_LKD)[is_live]


def _as_bytes(x: Tensor) -> Tensor:
    """The same memory as uint8, since torch indexes no fp8 on a CPU."""
    return x.view(torch.uint8)


def _check_indices(cache: Tensor, *indices: Tensor) -> None:
    for index in indices:
        if index.dtype != torch.int64 or index.device != cache.device or index.shape != indices[0].shape:
            raise ConfigError(
                f"indices are {index.dtype} {list(index.shape)} on {index.device}, but they must be int64 "
                f"{list(indices[0].shape)} on {cache.device}"
            )
        if index.dim() != 1 or not index.is_contiguous():
            raise ConfigError(f"indices are {list(index.shape)} with strides {index.stride()}, not contiguous [N]")


def _checked_buffer(cache_set: CacheSet, pages_N: Tensor, buffer: Tensor | None) -> Tensor:
    first = cache_set.caches[0]
    _check_indices(first, pages_N)
    shape = (pages_N.numel(), *cache_set.page_shape)
    if buffer is None:
        return torch.empty(shape, dtype=first.dtype, device=first.device)
    if buffer.shape != shape or buffer.dtype != first.dtype or buffer.device != first.device:
        raise ConfigError(
            f"pages are {buffer.dtype} {list(buffer.shape)} on {buffer.device}, but they must be {first.dtype} "
            f"{list(shape)} on {first.device}"
        )
    if not buffer.is_contiguous() or buffer.data_ptr() % ALIGNMENT:
        raise ConfigError(f"pages must be contiguous and start at a multiple of {ALIGNMENT} bytes")
    return buffer


def _check_tokens(cache: Tensor, slots_L: Tensor, tokens_LKD: Tensor) -> None:
    _check_indices(cache, slots_L)
    shape = (slots_L.numel(), cache.shape[1], cache.shape[3])
    if tokens_LKD.shape != shape or tokens_LKD.dtype != cache.dtype or tokens_LKD.device != cache.device:
        raise ConfigError(
            f"tokens are {tokens_LKD.dtype} {list(tokens_LKD.shape)} on {tokens_LKD.device}, but they must be "
            f"{cache.dtype} {list(shape)} on {cache.device}"
        )
    if tokens_LKD.stride(-1) != 1:
        raise ConfigError(f"tokens have strides {tokens_LKD.stride()}, but the last must be 1: call contiguous() first")
